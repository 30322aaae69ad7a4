"""Configuration files of benchmarks and judges name settings that there are."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from povid.benchmarks import suite
from povid.benchmarks.judge import Judge

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_benchmark(name):
    settings = OmegaConf.to_container(OmegaConf.load(CONF / "benchmarks" / f"{name}.yaml"), resolve=True)
    assert list(settings) == [name]
    suite.check_settings(name, settings[name])


def test_table3_has_all_eight():
    assert OmegaConf.load(CONF / "benchmarks" / "table3.yaml").defaults == list(suite.BENCHMARKS)


def test_judge():
    settings = OmegaConf.load(CONF / "judge" / "openai.yaml")
    assert settings.pop("_target_") == f"{Judge.__module__}.{Judge.__qualname__}"
    assert set(settings) <= set(inspect.signature(Judge).parameters)
