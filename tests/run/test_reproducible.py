"""Two runs with one seed have identical losses and adapters; another seed has others."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from forks import finish, outcome, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reproducible")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def test_two_runs_with_one_seed_are_the_same_run(world):
    outcomes = []
    for name, seed in (("first", 7), ("second", 7), ("other", 8)):
        assert finish(settings(world, f"seed={seed}", "reference_cache=false"), world / name) == 0
        outcomes.append(outcome(world / name))
    first, second, other = outcomes
    assert first == second
    assert all(first[key] != other[key] for key in first)
