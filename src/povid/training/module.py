"""POVIDModule: one training step in the paper's words; the only place that logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from povid.method import objective as objectives
from povid.method.objective import LogProbs, Objective
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceBatch
from povid.training.reference_cache import ReferenceCache, folder_key
from povid.training.scoring import score
from povid.training.sharding import FSDP2, shard


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """Which objective, and its coefficients.

    ``paper``: Eq. 3 in stage 1, Eq. 5 in stage 2 (alpha, beta_text = beta_1, beta_noise = beta_2). ``released``: DPO in
    stage 1, the mean of two DPO losses in stage 2 (beta, weights). ``preferred_only``: the control that is fine-tuned
    on the preferred responses alone.
    """

    name: str = "paper"
    alpha: float = 0.1
    beta_text: float = 0.05
    beta_noise: float = 0.05
    beta: float = 0.1
    weight_text: float = 0.5
    weight_noise: float = 0.5


@dataclass(frozen=True, slots=True)
class StageSettings:
    """How a stage trains (Table 5 and section 4.1).

    ``dispreferences``: what the stage can use, of ``text`` and ``noise``; the ablation says which of them it does use.
    ``batch_size`` counts records per device and step (``auto``: the most that fit), ``accumulate`` steps per optimiser
    step; ``max_steps`` -1 leaves the length to ``epochs``.
    """

    name: str
    dispreferences: tuple[str, ...]
    epochs: int
    lr: float
    projector_lr: float
    batch_size: int | str
    accumulate: int = 1
    max_steps: int = -1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class POVIDModule(L.LightningModule):
    """A LoRA policy, its frozen reference (the same network without adapter) and the objective of one stage.

    Args:
        policy: with a fresh adapter. objective, stage: settings. terms: the dispreferences in use, of "text", "noise".
        reference_cache: folder in which the reference's log-probabilities of the pairs are kept; None keeps none.
    """

    def __init__(
        self,
        policy: Policy,
        objective: ObjectiveSettings,
        stage: StageSettings,
        terms: frozenset[str],
        reference_cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.objective, self.stage, self.terms = policy, objective, stage, terms
        self.reference_cache, self._cache = reference_cache, None
        self.strict_loading = False  # a checkpoint holds what trains and nothing else

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP2):
            shard(self.policy, self.device_mesh["data_parallel"], offload=self.trainer.strategy.offload)

    def on_fit_start(self) -> None:
        self.policy.train()  # from_pretrained leaves evaluation mode, in which LoRA's dropout would do nothing
        self._cache = self._open_cache()

    def _open_cache(self) -> ReferenceCache | None:
        """Where it can help: the released noise term reads the reference's logits, and with sharded weights devices
        that have a batch's values and devices that lack them would wait for each other."""
        reads_logits = self.objective.name == "released" and "noise" in self.terms
        sharded = isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if self.reference_cache is None or reads_logits or sharded:
            return None
        data = self.trainer.datamodule
        key = folder_key(
            self.policy,
            precision=str(self.trainer.precision),
            terms=sorted(self.terms),
            seed=data.seed,
            records=len(data.dataset),
            grouped=data.group_by_length,
            text=data.text,
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
            self.trainer.strategy.barrier()  # what one device computed is read by all in the next epoch

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        known = self._cache.find(batch) if self._cache is not None else None
        policy, reference = score(
            self.policy, batch, noise_on_clean_image=self.objective.name == "released", known_reference=known
        )
        if self._cache is not None and known is None:
            self._cache.keep(batch, reference)
        outcome = self.loss(policy, reference, batch)
        self._log(outcome, batch.pairs.examples)
        return outcome.loss_B.mean()

    def loss(self, policy: LogProbs, reference: LogProbs, batch: PreferenceBatch) -> Objective:
        """The objective of this stage: [B] losses and rewards."""
        o = self.objective
        if o.name == "preferred_only":
            tokens_B = torch.bincount(batch.pairs.preferred.example_N, minlength=batch.pairs.examples)
            return objectives.preferred_only(policy, reference, tokens_B=tokens_B)
        if "noise" not in self.terms:
            return objectives.text_dispreference(policy, reference, alpha=o.alpha if o.name == "paper" else o.beta)
        if o.name == "paper":
            return objectives.povid(policy, reference, alpha=o.alpha, beta_text=o.beta_text, beta_noise=o.beta_noise)
        return objectives.released(
            policy, reference, beta=o.beta, weight_text=o.weight_text, weight_noise=o.weight_noise
        )

    def _log(self, outcome: Objective, examples: int) -> None:
        values: dict[str, Tensor] = {"loss": outcome.loss_B, "reward_preferred": outcome.reward_preferred_B}
        for kind, reward_B in (("text", outcome.reward_text_B), ("noise", outcome.reward_noise_B)):
            if reward_B is not None:
                margin_B = outcome.reward_preferred_B - reward_B
                values |= {
                    f"reward_{kind}": reward_B,
                    f"margin_{kind}": margin_B,
                    f"accuracy_{kind}": (margin_B > 0).float(),
                }
        means = {f"train/{name}": value_B.detach().float().mean() for name, value_B in values.items()}
        self.log_dict(means, batch_size=examples, on_step=True, on_epoch=False, sync_dist=True)
        self.log("loss", means["train/loss"], prog_bar=True, logger=False, batch_size=examples)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the projector's own learning rate, and a cosine with warm-up over the stage's steps."""
        from transformers import get_cosine_schedule_with_warmup

        lora, projector = self.policy.trained_parameters()
        groups = [{"params": lora, "lr": self.stage.lr}]
        if projector:
            groups.append({"params": projector, "lr": self.stage.projector_lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=self.stage.weight_decay, foreach=True)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.stage.warmup_ratio * steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._cache is not None:  # a resumed run must find every value that this one had
            self._cache.flush()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
