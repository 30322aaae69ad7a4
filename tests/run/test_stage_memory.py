"""What a finished stage held is gone when the next one loads."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import tiny
from forks import finish, settings

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
    assert "stage 2 loads; alive: 0" in log, [line for line in log.splitlines() if "alive" in line]
