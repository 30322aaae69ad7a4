# `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.PHONY: help setup demo data table3 arena report test test-slow world bench lint format docs clean

help:  ## print this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(DONE)  ## create .venv and install the package with its dependencies

$(DONE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: POVID needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) '.[test]'
	@touch $(DONE)

# .venv/.extra-NAME: the optional dependencies [NAME] of pyproject.toml are installed.
$(VENV)/.extra-%: $(DONE)
	$(PIP) '.[$*]'
	@touch $@

demo: $(DONE)  ## make Table 3 on the embedded world: four runs, one seed
	$(BIN)/python train.py -m ablation=none,text,noise,both

data: $(DONE)  ## get what experiment=table3 needs into $POVID_DATA (or data), and print what is missing
	@$(BIN)/python -m povid.preferences fetch povid_17k; first=$$?; $(BIN)/python -m povid.benchmarks fetch table3 && exit $$first

FIVE := seed=0,1,2,3,4 'data.prepare.seed=$${seed}' resume=true

table3: $(DONE)  ## the same over five seeds, each in a world of its own, with the controls
	$(BIN)/python train.py -m ablation=none,text,noise,both $(FIVE) hydra.sweep.dir=outputs/table3/ablations
	$(BIN)/python train.py -m experiment=preferred_only ablation=text,noise,both $(FIVE) hydra.sweep.dir=outputs/table3/preferred_only
	$(BIN)/python train.py -m experiment=swaps_only $(FIVE) hydra.sweep.dir=outputs/table3/swaps_only
	$(BIN)/python -m povid.report outputs/table3
	$(BIN)/python -m povid.report page outputs/table3

arena: $(DONE)  ## compare objectives and distortions in three worlds, as conf/arena.yaml says
	$(BIN)/python -m povid.arena

test: $(VENV)/.extra-browser  ## run the tests, except the slow ones
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal

test-slow: $(VENV)/.extra-bench  ## run the slow tests, and those against TRL
	$(BIN)/python -m pytest -q tests/bench/test_trl.py
	$(BIN)/python -m pytest -q -m slow

world: $(DONE)  ## train the embedded world's base model again and compare it with the shipped one
	$(BIN)/python -m povid.scenes build

bench: $(VENV)/.extra-bench  ## time a training step beside the plain form, the released code and TRL
	$(BIN)/python -m povid.bench

lint: $(VENV)/.extra-lint  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.extra-lint  ## format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.extra-docs  ## build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the virtual environment, caches and build results; outputs stay
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache site build dist src/*.egg-info
