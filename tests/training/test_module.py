from __future__ import annotations

import math

import lightning as L
import pytest
import tiny
import torch

from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.preferred_only import PreferredOnly
from povid.method.objectives.released import Released
from povid.model.template import Template
from povid.run.loggers import Metrics
from povid.training.datamodule import PreferenceDataModule
from povid.training.module import POVIDModule

STAGE = tiny.stage("text", "noise")
EQ_5 = POVID()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_llava(tmp_path_factory.mktemp("tiny"))


def fit(folder, out, objective=EQ_5, *, terms=frozenset({"text", "noise"}), stage=STAGE, precision="32-true", **model):
    L.seed_everything(0, verbose=False)
    policy, template = tiny.load(folder, perturb=False, **model)
    scored = objective.terms(terms)
    module = POVIDModule(policy, objective, stage, scored)
    data = PreferenceDataModule(
        tiny.triples(folder),
        template,
        terms=scored,
        distortion=tiny.noise(),
        packable=True,
        batch_size=stage.batch_size,
        seed=0,
    )
    trainer = L.Trainer(
        max_epochs=stage.epochs,
        accumulate_grad_batches=stage.accumulate,
        accelerator="cpu",
        logger=False,
        callbacks=[Metrics(out / "metrics.csv")],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        precision=precision,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, data)
    header, *lines = (out / "metrics.csv").read_text().splitlines()
    return module, [dict(zip(header.split(","), line.split(","))) for line in lines]


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        (DPO(), {"text"}),
        (POVID(), {"noise"}),
        (POVID(), {"text", "noise"}),
        (Released(), {"noise"}),
        (Released(), {"text", "noise"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else type(value).__name__,
)
def test_training_starts_at_log_2_and_moves_what_it_should(folder, tmp_path, terms, objective):
    before, _ = tiny.load(folder, perturb=False)
    module, steps = fit(folder, tmp_path, objective, terms=frozenset(terms))
    assert float(steps[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert len(steps) == 4 and float(steps[-1]["loss"]) != float(steps[0]["loss"])
    assert "rewards/margins" in steps[0]
    for kind in ("text", "noise"):
        assert (f"rewards/margins_{kind}" in steps[0]) == (len(terms) == 2)
    changed = {
        name
        for (name, old), new in zip(before.network.named_parameters(), module.policy.network.parameters())
        if not torch.equal(old, new)
    }
    assert changed == {name for name, p in module.policy.network.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in changed) and any("modules_to_save" in name for name in changed)


def test_only_loras_dropout_is_active(folder, tmp_path):
    module, _ = fit(folder, tmp_path, lora=tiny.LoraSettings(r=4, alpha=8, dropout=0.5))
    dropouts = {name: m.training for name, m in module.policy.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts and all(training == ("lora_dropout" in name) for name, training in dropouts.items())


def test_accumulation_equals_the_larger_batch(folder, tmp_path):
    """Four records as two steps of two, or as one of four: the same gradient, hence the same adapter."""
    two = fit(folder, tmp_path / "two", stage=tiny.stage(epochs=3, accumulate=2))[0]
    four = fit(folder, tmp_path / "four", stage=tiny.stage(epochs=3, batch_size=4))[0]
    for one, other in zip(two.policy.trained_parameters()[0], four.policy.trained_parameters()[0]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bf16_is_near_float32(folder, tmp_path):
    _, exact = fit(folder, tmp_path / "exact")
    _, rough = fit(folder, tmp_path / "rough", precision="bf16-mixed")
    for a, b in zip(exact, rough):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=0.05)


def test_rates_are_those_of_the_stage(folder, tmp_path):
    """Four steps, a quarter of them warm-up: after step 1 the full rate, then a cosine down to zero."""
    module, _ = fit(folder, tmp_path)
    lora, projector = module.optimizers().param_groups
    assert (lora["initial_lr"], projector["initial_lr"]) == (1e-3, 1e-4)
    assert lora["lr"] == pytest.approx(0, abs=1e-12)
    schedule = module.lr_schedulers()
    assert [round(schedule.lr_lambdas[0](step), 4) for step in range(5)] == [0, 1, 0.75, 0.25, 0]


def test_the_control_needs_no_dispreference(folder, tmp_path):
    stage = tiny.stage(epochs=4, lr=1e-2, batch_size=4, warmup_ratio=0.03)
    _, steps = fit(folder, tmp_path, PreferredOnly(), terms=frozenset(), stage=stage)
    losses = [float(step["loss"]) for step in steps]
    assert losses[-1] < losses[0] and "rewards/rejected" not in steps[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_record_without_response_tokens_teaches_nothing(folder, tmp_path, monkeypatch, batch_size):
    """As the released masking leaves records of several rounds: loss log 2, and the adapter stays what it was."""
    monkeypatch.setattr(Template, "_released_marks", lambda self, text, length: [False] * length)
    stage = STAGE.model_copy(update={"batch_size": batch_size, "epochs": 1})
    module, rows = fit(folder, tmp_path, stage=stage, masking="released")
    losses = [float(row["loss"]) for row in rows]
    assert losses == pytest.approx([math.log(2)] * len(losses)) and losses
    added = [weight for name, weight in module.policy.named_parameters() if "lora_B" in name]
    assert added and all(not weight.any() for weight in added)
