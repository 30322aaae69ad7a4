"""Every setting of an objective or a distortion is in the identity of the stages that read it, and of no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from povid.run.content import of_stage
from povid.run.identity import flat
from povid.run.settings import build

CONF = Path(__file__).resolve().parents[2] / "conf"
CONTENT: Any = SimpleNamespace(records="r", records_as_read="r", pictures="p", weights="w")
OPTIONS = [(group, file.stem) for group in ("objective", "noise") for file in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["logger=none", "benchmarks=[]", *overrides])


def digests(cfg) -> dict[int, str]:
    """Of both stages."""
    settings = build(cfg)
    return {stage: of_stage(settings, stage, (), CONTENT).digest for stage in (1, 2)}


def another(value: Any) -> Any:
    """Another valid value of a setting."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.9 if value else 0.5
    return {"normalized": "pixel", "pixel": "normalized"}.get(value)


def settings(node: Any) -> Iterator[tuple[str, Any]]:
    for key, value in flat(OmegaConf.to_container(node)):
        if key != "name" and another(value) is not None:
            yield key, another(value)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=str)
def test_every_setting_is_in_the_identity(group, option):
    needs = ["objective=released", "noise.space=pixel"] if group == "noise" else []  # of noise.wrap_around alone
    cfg = composed(f"{group}={option}", *(needs if "space" in composed(f"{group}={option}")[group] else []))
    before = digests(cfg)
    for key, value in settings(cfg[group]):
        changed = cfg.copy()
        OmegaConf.update(changed, f"{group}.{key}", value)
        if value == "normalized":
            changed.noise.wrap_around = False
        found = digests(changed)
        stages = {int(key[0])} if key[0] in "12" else {2} if group == "noise" else {1, 2}
        assert {stage for stage in (1, 2) if found[stage] != before[stage]} == stages, key


def test_a_distortion_that_is_not_seen_is_not_in_it():
    for objective in ("ipo", "mdpo"):
        one, other = (digests(composed(f"objective={objective}", f"noise={noise}")) for noise in ("crop", "blur"))
        assert one[1] == other[1] and one[2] != other[2]
