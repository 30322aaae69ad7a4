"""What a finished stage held is gone when the next one loads."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from forks import composed, finish, settings

from povid.run import experiment
from povid.run.stage import Stage


def test_a_stage_is_released_before_the_next_one_loads(tmp_path: Path):
    """With the cyclic collector off, so that it is released by the run and not by chance."""
    tiny.save_tiny_llava(tmp_path / "tiny")

    def watched() -> None:
        gc.disable()
        load, fit, model = Stage.load, Stage._fit, []

        def loaded(self):
            print(
                f"stage {self.number} loads; alive: {sum(reference() is not None for reference in model)}", flush=True
            )
            policy, template = load(self)
            model.extend(map(weakref.ref, policy.parameters()))
            return policy, template

        def fitted(self, module, *rest):
            steps = fit(self, module, *rest)
            states = [value for optimizer in module.trainer.optimizers for value in optimizer.state.values()]
            model.extend(weakref.ref(value) for state in states for value in state.values())
            assert states
            return steps

        Stage.load, Stage._fit = loaded, fitted

    assert finish(settings(tmp_path), tmp_path / "run", watched) == 0, (tmp_path / "run.log").read_text()
    log = (tmp_path / "run.log").read_text()
    assert json.loads((tmp_path / "run" / "stage_2" / "stage.json").read_text())["gradient_checkpointing"] is False
    assert "stage 2 loads; alive: 0" in log, [line for line in log.splitlines() if "alive" in line]


@pytest.mark.slow
def test_a_process_that_runs_many_stages_stays_as_large_as_with_one(tmp_path: Path):
    """Six stages of three runs, each policy and each optimizer with 200 MB beside it. The process's size is read as
    each stage loads: from the second on it must stay the same, or a sweep would end for want of memory."""
    tiny.save_tiny_llava(tmp_path / "tiny")
    command = settings(tmp_path, "stages.1.max_steps=1", "stages.2.max_steps=1", "benchmarks=[]")
    others = [[*command, f"seed={seed}"] for seed in (1, 2)]
    configs = [composed(*other) for other in others]

    def resident() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024

    def watched() -> None:
        gc.disable()
        load, fit = Stage.load, Stage._fit

        def loaded(self):
            print(f"resident: {resident()} MB", flush=True)
            policy, template = load(self)
            policy.ballast = torch.ones(50_000_000)
            return policy, template

        def fitted(self, module, *rest):
            steps = fit(self, module, *rest)
            module.trainer.optimizers[0].ballast = torch.ones(50_000_000)
            return steps

        Stage.load, Stage._fit = loaded, fitted
        for number, config in enumerate(configs):
            experiment.run(config, tmp_path / f"run_{number}")

    assert finish(command, tmp_path / "run", watched) == 0, (tmp_path / "run.log").read_text()
    sizes = list(map(int, re.findall(r"resident: (\d+) MB", (tmp_path / "run.log").read_text())))
    assert len(sizes) == 6 and max(sizes[3:]) - sizes[2] < 150, sizes
