"""Metrics under TRL's names, and when they are fetched from the device."""

from __future__ import annotations

import math

import lightning as L
import pytest
import tiny
import torch

from povid.method.objectives import Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.preferred_only import PreferredOnly
from povid.run.checkpoint import Checkpoints, CheckpointSettings
from povid.run.guards import FiniteLoss
from povid.run.loggers import Metrics
from povid.run.signals import Signals
from povid.run.stage import Bar
from povid.training.datamodule import PreferenceDataModule
from povid.training.metrics import Window, measure
from povid.training.module import POVIDModule


def terms(**values: list[float]) -> Terms:
    return Terms(**{name: torch.tensor(value) for name, value in values.items()})


def measured(objective, policy: Terms, reference: Terms | None, tokens: Terms, **observed) -> dict[str, float]:
    outcome = objective(policy, reference, tokens)
    found = measure(outcome, policy, reference, tokens, observed, objective.scale)
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    return {name: value.item() for name, value in found.items()}


def test_names_and_values_are_those_of_trl():
    """Two records, log pi/ref (1, -2) for y_w and (-1, -1) for y_l^t, alpha = 0.1: rewards .1, -.2 and -.1, -.1."""
    found = measured(
        DPO(),
        terms(preferred=[-4, -7], text=[-6, -6]),
        terms(preferred=[-5, -5], text=[-5, -5]),
        terms(preferred=[1, 2]),
    )
    assert found == pytest.approx(
        {
            "loss": (math.log1p(math.exp(-0.2)) + math.log1p(math.exp(0.1))) / 2,
            "rewards/chosen": -0.05,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.05,
            "rewards/accuracies": 0.5,
            "weighted_rewards/chosen": -0.05,
            "weighted_rewards/rejected": -0.1,
            "logps/chosen": -5.5,
            "logps/rejected": -6.0,
            # log r = -1 over one token and 2 / 2 over two
            "kl": ((math.exp(-1) - 1 + 1) + (math.exp(1) - 1 - 1)) / 2,
        }
    )


def test_stage_2_is_on_the_scale_of_stage_1_beside_its_own_weights():
    """One record, log pi/ref 3, 1, -1 for y_w, y_l^t, y_l^n: rewards .3, .1, -.1; in the loss .3, .05, -.05."""
    policy = terms(preferred=[-2], text=[-4], noise=[-6])
    found = measured(
        POVID(), policy, terms(preferred=[-5], text=[-5], noise=[-5]), terms(preferred=[3]), noise_differs=torch.ones(1)
    )
    assert found["rewards/rejected"] == pytest.approx(0) and found["rewards/margins"] == pytest.approx(0.3)
    assert found["rewards/rejected_text"] == pytest.approx(0.1)
    assert found["rewards/margins_noise"] == pytest.approx(0.4)
    assert found["rewards/accuracies_text"] == found["rewards/accuracies_noise"] == 1
    assert found["weighted_rewards/rejected_text"] == pytest.approx(0.05)
    assert found["weighted_rewards/rejected_noise"] == pytest.approx(-0.05)
    assert (found["logps/rejected_noise"], found["noise_differs"]) == (-6, 1)


def test_what_is_not_there_is_not_logged():
    policy = terms(preferred=[-2.0])
    alone = measured(PreferredOnly(), policy, terms(preferred=[-3.0]), terms(preferred=[2.0]))
    assert set(alone) == {"loss", "rewards/chosen", "weighted_rewards/chosen", "logps/chosen", "kl"}


def test_a_window_is_fetched_in_one_reduction():
    window, reductions = Window(), []
    for step in (1.0, 2.0, 6.0):
        window.add({"loss": torch.tensor(step), "kl": torch.tensor(0.0)})
    window.add({"grad_norm": torch.tensor(4.0)})
    for _ in range(2):  # nothing is left to fetch the second time
        window.settle(lambda values: reductions.append(values.shape) or values / 2)
    assert reductions == [(7,)]
    assert window.values == {"loss": [0.5, 1.0, 3.0], "kl": [0.0, 0.0, 0.0], "grad_norm": [2.0]}
    assert window.take() == {"loss": 1.5, "kl": 0.0, "grad_norm": 2.0} and window.values == {}


def test_between_logging_steps_nothing_is_read_from_the_device(tmp_path):
    """Steps 2 and 3 of four, from the start of a batch to the start of the next but one, with all that a run does.

    SGD, since AdamW reads its step counters, which it keeps on the CPU. The batches' pictures are cached in epoch 1.
    """
    tiny.save_tiny_llava(tmp_path / "tiny")
    policy, template = tiny.load(tmp_path / "tiny", perturb=False)
    stage, terms = tiny.stage("text", "noise", batch_size=1), POVID().terms({"text", "noise"})
    module = POVIDModule(policy, POVID(), stage, terms, optimizer=torch.optim.SGD)
    shared = {"terms": terms, "distortion": tiny.noise(), "packable": True, "batch_size": 1, "seed": 0}
    data = PreferenceDataModule(tiny.triples(tmp_path), template, **shared)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    class Profiled(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                profiler.start()
            if trainer.global_step == 3:
                torch.ones(1).item()  # to see that it would be seen
                profiler.stop()

    metrics = Metrics(tmp_path / "metrics.csv")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        callbacks=[
            Profiled(),
            FiniteLoss(1, tmp_path),
            metrics,
            Checkpoints(tmp_path, CheckpointSettings(), Signals(tmp_path), metrics),
            Bar(),
        ],
    )
    trainer.fit(module, data)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::_local_scalar_dense"] == 1
    assert counts["aten::mm"] > 100 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    assert module.latest["loss"] > 0 and "examples_per_second" in module.latest
