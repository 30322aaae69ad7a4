# POVID. `make help` lists what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow table3 world bench lint clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(DONE)  ## virtual environment, dependencies, package (in .venv)

$(DONE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(DONE)

demo: $(DONE)  ## Table 3 on the embedded world: four runs, one seed
	$(BIN)/python train.py -m ablation=none,text,noise,both

table3: $(DONE)  ## the same over five seeds, with the controls
	$(BIN)/python train.py -m ablation=none hydra.sweep.dir=outputs/table3/none
	$(BIN)/python train.py -m ablation=text,noise,both seed=0,1,2,3,4 hydra.sweep.dir=outputs/table3/ablations
	$(BIN)/python train.py -m experiment=preferred_only ablation=text,noise,both seed=0,1,2,3,4 hydra.sweep.dir=outputs/table3/preferred_only
	$(BIN)/python train.py -m experiment=swaps_only seed=0,1,2,3,4 hydra.sweep.dir=outputs/table3/swaps_only
	$(BIN)/python -m povid.report outputs/table3

test: $(DONE)  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -q

test-slow: $(DONE)  ## the slow tests, and those against TRL
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m pytest -q tests/bench/test_trl.py
	$(BIN)/python -m pytest -q -m slow

world: $(DONE)  ## train the embedded world's base model anew and compare it with the shipped one
	$(BIN)/python -m povid.scenes build

bench: $(DONE)  ## what a training step costs, beside the plain way, the released code and TRL
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m povid.bench

lint: $(DONE)  ## ruff
	$(BIN)/pip install --quiet --disable-pip-version-check ruff
	$(BIN)/ruff check src tests train.py

clean:  ## remove the virtual environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache src/*.egg-info
