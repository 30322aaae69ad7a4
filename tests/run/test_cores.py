"""Threads that wait give way, and jobs side by side share the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from povid.run import cores

CONF = Path(__file__).resolve().parents[2] / "conf"


def threads_of(monkeypatch, overrides, jobs, *, sweeper=(), given=None, machine=8):
    monkeypatch.setattr(cores, "cores", lambda: machine)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    config = OmegaConf.create({"hydra": {"sweeper": dict(sweeper), "overrides": {"task": overrides}}})
    cores.ShareOfCores(jobs).on_multirun_start(config)
    found = os.environ.get("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found and int(found)


@pytest.mark.parametrize(
    ("overrides", "jobs", "more", "expected"),
    [
        (["ablation=none,both", "seed=range(0,2)"], None, {}, 2),  # four jobs on eight cores
        (["ablation=none,both", "seed=range(0,2)"], 2, {}, 4),
        (["ablation=none,both"], 3, {}, 4),  # there are only two
        (["seed=range(0,20)"], None, {}, 1),
        (["seed=range(0,20)"], None, {"sweeper": {"max_batch_size": 4}}, 2),
        (["seed=range(0,20)"], -1, {}, 1),
        (["stages.1.lr=interval(1,2)"], None, {"sweeper": {"n_jobs": 2}}, 4),
        (["benchmarks=[chair,pope]"], None, {}, None),  # one job alone is left as it is
        (["seed=0,1"], None, {"given": "5"}, 5),
    ],
)
def test_jobs_side_by_side_get_one_share_each(monkeypatch, overrides, jobs, more, expected):
    assert threads_of(monkeypatch, overrides, jobs, **more) == expected


def test_launchers_that_run_jobs_side_by_side_share_the_cores():
    for name, jobs in (("joblib", "${hydra.launcher.n_jobs}"), ("submitit_local", None)):
        node = yaml.safe_load((CONF / "launcher" / f"{name}.yaml").read_text())["hydra"]["callbacks"]["cores"]
        assert node.pop("_target_") == "povid.run.cores.ShareOfCores" and node.get("jobs") == jobs


def test_spinning_is_limited_before_torch_is_there_unless_the_user_says_otherwise():
    asked = "import os, sys, povid.run.command; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, said in (
        ({}, "1000 False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        found = subprocess.run(
            [sys.executable, "-c", asked], env=clean | given, capture_output=True, text=True, check=True
        )
        assert found.stdout.startswith(said), found
