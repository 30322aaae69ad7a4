"""TRL's own DPOTrainer as an arm: its training_step on its own batches of the same tokens and pictures (stage 1)."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from povid.bench.arms import Arm
from povid.bench.subject import Step, twin
from povid.model.policy import Policy


def trl_dpo(
    policy: Policy,
    base: nn.Module,
    processor: Any,
    *,
    checkpoint: bool,
    beta: float = 0.1,
    loss_type: str | list[str] = "sigmoid",
) -> tuple[Arm, list[nn.Parameter]]:
    """An arm and the parameters that it trains: a fresh peft model of TRL's making with the policy's adapter weights.

    TRL wraps the bare model itself, so that its reference is the model without adapter, as here. ``checkpoint``:
    gradient checkpointing, which TRL uses by default. ``beta`` and ``loss_type`` are TRL's; by default those of
    stage 1's objective.
    """
    from datasets import Dataset
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    model = twin(base)
    device = next(base.parameters()).device
    folder = tempfile.mkdtemp(prefix="povid-bench-trl-")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            folder,
            beta=beta,
            loss_type=loss_type,
            gradient_checkpointing=checkpoint,
            bf16=policy.settings.dtype == "bfloat16",
            use_cpu=device.type == "cpu",
            report_to="none",
            per_device_train_batch_size=1,
            max_length=None,
            disable_tqdm=True,
            save_strategy="no",
        ),
        # TRL's constructor requires a data set; the steps below pass batches laid out as by its collator.
        train_dataset=Dataset.from_list(
            [{"images": [Image.new("RGB", (8, 8))], "prompt": "USER: <image>", "chosen": "w1", "rejected": "w2"}]
        ),
        processing_class=processor,
        peft_config=copy.deepcopy(policy.model.peft_config["default"]),
    )
    peft_model = trainer.model
    trainer.current_gradient_accumulation_steps = 1  # train() would do this and the next
    if checkpoint:
        peft_model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    mine = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    if mine.keys() != trained.keys():
        raise RuntimeError("TRL trains other parameters than the policy")
    for name, parameter in trained.items():
        parameter.data.copy_(mine[name].data)
    laid_out: dict[int, dict[str, Tensor]] = {}

    def run(step: Step, pinned: Tensor | None = None) -> Tensor:
        if id(step) not in laid_out:
            laid_out[id(step)] = inputs_of(step, policy.network.dtype)
        return trainer.training_step(peft_model, dict(laid_out[id(step)]))

    name = "TRL DPOTrainer, as it comes" if checkpoint else "TRL DPOTrainer"
    return Arm(name, "stage 1", run), list(trained.values())


def inputs_of(step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
    """TRL's layout: all chosen rows, then all rejected ones, padded on the right, each half with the images."""
    rows = [e.preferred for e in step.examples] + [e.dispreferred for e in step.examples]
    longest = max(len(row.input_ids) for row in rows)
    device = step.text.pairs.input_ids_BT.device
    pixels = torch.cat([e.images["pixel_values"] for e in step.examples] * 2).to(dtype)

    def table(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values], device=device)

    return {
        "input_ids": table([row.input_ids for row in rows], 2),
        "attention_mask": table([[1] * len(row.input_ids) for row in rows], 0),
        "completion_mask": table([[int(mark) for mark in row.response] for row in rows], 0),
        "pixel_values": pixels,
    }
