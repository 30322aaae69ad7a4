"""POVIDModule: one training step in the paper's words."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.distributed.tensor import DTensor

from povid.method.objectives import Objective, Outcome, Terms
from povid.model.packing import PADDING
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceBatch, PreferenceDataModule
from povid.training.metrics import Window, measure
from povid.training.reference_cache import ReferenceCache, folder_key
from povid.training.scoring import score
from povid.training.sharding import FSDP2, shard


class StageSettings(BaseModel):
    """How a stage trains (Table 5 and section 4.1).

    ``dispreferences``: those that the stage can use; the ablation selects among them. ``batch_size``: records per
    device and step (``auto``: as many as fit); ``accumulate``: steps per optimiser step; ``max_steps``: -1 for no limit
    besides ``epochs``; ``warmup_ratio``: share of all steps; ``max_grad_norm``: 0 for no clipping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    dispreferences: list[Literal["text", "noise"]]
    epochs: Annotated[int, Field(ge=0)]
    lr: Annotated[float, Field(gt=0, le=1)]
    projector_lr: Annotated[float, Field(ge=0, le=1)]
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"]
    accumulate: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=-1)] = -1
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _has_a_length(self) -> StageSettings:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0, which trains nothing; -1 leaves the length to epochs")
        if self.epochs < 1 and self.max_steps < 1:
            raise ValueError(f"epochs is {self.epochs} and max_steps {self.max_steps}; one must be at least 1")
        return self


def adamw(parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """conf/optimizer/adamw.yaml in Python."""
    return torch.optim.AdamW(parameters, foreach=True)


def cosine(optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int) -> Any:
    """conf/schedule/cosine.yaml in Python."""
    from transformers import get_scheduler

    return get_scheduler("cosine", optimizer, num_warmup_steps, num_training_steps)


class POVIDModule(L.LightningModule):
    """A LoRA policy, its frozen reference (the same network without adapter) and the objective of one stage.

    Args:
        policy: with a fresh adapter.
        objective: computes the loss.
        stage: how this stage trains.
        terms: what the objective reads in this stage (:meth:`povid.method.objectives.Objective.terms`).
        optimizer: takes parameter groups with their ``lr`` and ``weight_decay``.
        schedule: takes the optimiser, ``num_warmup_steps`` and ``num_training_steps``; stepped once per optimiser step.
        reference_cache: folder that keeps the reference log-probabilities of the pairs; None for no cache.

    Attributes:
        window: the metrics of the steps since the last logging step.
        rates: the learning rates of the last optimiser step.
        stepped: whether the last batch ended with an optimiser step.
        latest: what was logged last, by name, for progress bars: reading it never waits for the device.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        stage: StageSettings,
        terms: Set[str],
        *,
        optimizer: Callable[..., torch.optim.Optimizer] | partial = adamw,
        schedule: Callable[..., Any] | partial = cosine,
        reference_cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.objective, self.stage, self.terms = policy, objective, stage, frozenset(terms)
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.reference_cache = reference_cache
        self._cache: ReferenceCache | None = None
        self.window = Window()
        self.rates: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.stepped = False
        self._steps = 0
        self.strict_loading = False  # a checkpoint contains the trained weights only

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP2):
            shard(self.policy, self.device_mesh["data_parallel"], offload=self.trainer.strategy.offload)

    def on_fit_start(self) -> None:
        self.policy.train()  # from_pretrained leaves evaluation mode, in which LoRA's dropout would do nothing
        self._cache = self._open_cache()

    def _open_cache(self) -> ReferenceCache | None:
        """The cache, where it can help.

        A term scored on the reference's own clean logits needs that forward pass anyway. With sharded weights, devices
        that have a batch's values cached would wait for devices that do not.
        """
        sharded = isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        useless = not self.objective.reference or "noise_on_clean" in self.terms
        if self.reference_cache is None or useless or sharded:
            return None
        trainer: Any = self.trainer  # Lightning declares no datamodule
        data: PreferenceDataModule = trainer.datamodule
        key = folder_key(
            self.policy,
            precision=str(self.trainer.precision),
            terms=sorted(self.terms),
            weights=repr(self.objective) if self.objective.token_weights else None,
            seed=data.seed,
            records=len(data.dataset),
            grouped=data.group_by_length,
            batch_size=data.batch_size,
            devices=self.trainer.world_size,
        )
        dtype = torch.float64 if next(self.policy.parameters()).dtype == torch.float64 else torch.float32
        return ReferenceCache(self.reference_cache, key, dtype=dtype)

    def on_train_epoch_start(self) -> None:
        if self._cache is not None:
            self._cache.load()

    def on_train_epoch_end(self) -> None:
        if self._cache is not None:
            self._cache.flush()
            self.trainer.strategy.barrier()  # all devices read these values in the next epoch

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        known = self._cache.find(batch) if self._cache is not None else None
        outcome, reference, metrics = self.measured(batch, known)
        if self._cache is not None and known is None:
            self._cache.keep(batch, reference)
        self.stepped = False
        tokens = (batch.pairs.segment_BT != PADDING).sum() / batch.pairs.examples  # both responses packed
        self.window.add(metrics | {"tokens": tokens})
        return outcome.loss_B.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        self.window.add({"grad_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm})  # before clipping
        rates = [group["lr"] for group in optimizer.param_groups]
        self.rates = dict(zip(("lr", "lr_projector"), rates))
        self.stepped = True

    @property
    def logs_now(self) -> bool:
        """Whether the step that has just ended is a logging step: every ``log_every_n_steps``, and the last one."""
        trainer: Any = self.trainer
        step = trainer.global_step
        last = step == self._steps or trainer.should_stop
        return self.stepped and (last or step % trainer.log_every_n_steps == 0)

    def settle(self) -> None:
        """Fetch the window's metrics from the device; all processes call it together."""
        self.window.settle(lambda values: self.trainer.strategy.reduce(values, reduce_op="mean"))

    def outcome(self, batch: PreferenceBatch, known_reference: Terms | None = None) -> tuple[Outcome, Terms | None]:
        """Loss and rewards of a batch, and the reference log-probabilities."""
        outcome, reference, _ = self.measured(batch, known_reference)
        return outcome, reference

    def measured(
        self, batch: PreferenceBatch, known_reference: Terms | None = None
    ) -> tuple[Outcome, Terms | None, dict[str, Tensor]]:
        """The outcome of a batch, the reference log-probabilities, and the metrics (scalars on the device)."""
        observed: dict[str, Tensor] = {}
        policy, reference = score(
            self.policy,
            batch,
            self.terms,
            with_reference=self.objective.reference,
            known_reference=known_reference,
            differing_only=self.objective.differing_only,
            observed=observed,
        )
        outcome = self.objective(policy, reference, batch.tokens)
        metrics = measure(outcome, policy, reference, batch.tokens, observed, self.objective.scale)
        return outcome, reference, metrics

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The configured optimiser, with a separate learning rate for the projector, and schedule."""
        lora, projector = self.policy.trained_parameters()
        groups = [{"params": lora, "lr": self.stage.lr, "weight_decay": self.stage.weight_decay}]
        if projector:
            groups.append({**groups[0], "params": projector, "lr": self.stage.projector_lr})
        optimizer = self.make_optimizer(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        self._steps = steps
        warmup = round(self.stage.warmup_ratio * steps)
        schedule = self.make_schedule(optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._cache is not None:  # a resumed run must find all values of this one
            self._cache.flush()
        self.settle()
        checkpoint["metrics"] = self.window.values  # so that the means after a resumption are those without one
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.window.values = {name: list(values) for name, values in checkpoint.get("metrics", {}).items()}
