"""Every file of conf/benchmarks builds its benchmark, and old overrides reach it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from povid.benchmarks import __main__ as command
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.judge import Judge
from povid.server import retired

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(option: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"benchmarks/{option}", overrides=list(overrides)).benchmarks


def test_every_benchmark_has_a_configuration_of_its_name_with_all_its_settings():
    files = {file.stem for file in (CONF / "benchmarks").glob("*.yaml")}
    assert files == {*command.names(), "table3"}
    for name in command.names():
        nodes = composed(name)
        assert list(nodes) == [name]
        built = instantiate(nodes[name], _convert_="all")
        assert type(built) is command.find(name) and built.name == name
        assert set(nodes[name]) == {"_target_", *type(built).model_fields} - {"limit"}, "benchmarks.limit sets it"
        assert built.columns and all(column.key.startswith(f"{name}.") for column in built.columns)
        assert (built.judged == "never") == (not built.official_judge)


def test_table3_has_all_eight_and_overrides_reach_them():
    nodes = composed(
        "table3",
        "benchmarks.chair.max_new_tokens=50",
        "benchmarks.chair.ids=[3,a.png]",
        "benchmarks.pope.splits=[random]",
        "benchmarks.mm_vet.runs=5",
    )
    built: dict[str, Benchmark] = instantiate(nodes, _convert_="all")
    assert set(built) == set(command.names()) - {"amber", "repope"}  # the paper's eight
    assert built["chair"].decoding.max_new_tokens == 50 and built["chair"].ids == (3, "a.png")
    assert built["pope"].splits == ("random",) and built["pope"].decoding.stop == "."
    assert built["mm_vet"].runs == 5


@pytest.mark.parametrize("name", ["openai", "open"])
def test_judge(name, monkeypatch):
    """It is the same in a run and on the command line, lives today, and an open one names its revision."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    node = OmegaConf.merge({"outputs": "outputs"}, {"judge": OmegaConf.load(CONF / "judge" / f"{name}.yaml")}).judge
    judge = instantiate(node, _convert_="all")
    assert isinstance(judge, Judge)
    assert judge == Judge(**command._judge_file(name))
    assert retired.retirement(judge.model, judge.base_url) is None
    assert bool(judge.revision) == (name == "open")
