"""Implementations of one training step. Each returns the loss of a batch and computes the adapter's gradients.

Ours is ``povid.training.scoring``. The plain one sends each sequence through the whole model separately. The released
one computes what the authors' trainer does (YiyangZhou/POVID, tool/dpo_trainer_inherent.py): three forward passes per
model, and two more vision passes that only align labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from povid.bench.subject import Step
from povid.method.objectives import Objective, Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.released import Released
from povid.model.packing import Encoded
from povid.model.policy import Policy
from povid.training.datamodule import Example
from povid.training.reference_cache import ReferenceCache
from povid.training.scoring import score

OBJECTIVES: dict[str, Objective] = {"stage 1": DPO(), "eq5": POVID(), "released": Released()}


@dataclass(frozen=True, slots=True)
class Arm:
    """``task`` is stage 1, released or eq5; ``run(step, pinned)`` computes forward and backward and returns the loss.

    ``pinned`` fixes y_l^n [N], to check that all arms compute the same loss.
    """

    name: str
    task: str
    run: Callable[[Step, Tensor | None], Tensor]


def loss_of(task: str, policy: Terms, reference: Terms) -> Tensor:
    """The mean loss of a batch."""
    return OBJECTIVES[task](policy, reference, Terms()).loss_B.mean()


@contextmanager
def checkpointing(policy: Policy, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    policy.network.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in policy.network.get_decoder().layers:
        layer.training = True  # transformers recomputes a layer only in training mode
    yield
    policy.network.gradient_checkpointing_disable()
    policy.train()


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(policy: Policy, task: str, cache: ReferenceCache | None = None) -> Arm:
    """This project's algorithm; the reference of the text pair is read from ``cache`` if it contains the batch."""

    def run(step: Step, pinned: Tensor | None = None) -> Tensor:
        batch = step.text if task == "stage 1" else step.both
        known = cache.find(batch) if cache is not None else None
        terms = OBJECTIVES[task].needs
        loss = loss_of(task, *score(policy, batch, terms, noise_tokens_N=pinned, known_reference=known))
        loss.backward()
        return loss

    return Arm("ours" if cache is None else "ours, reference cached", task, run)


def filled_cache(policy: Policy, steps: list[Step], folder) -> ReferenceCache:
    """A cache of the reference of every batch, filled as in a first epoch."""
    cache = ReferenceCache(folder, "bench" * 8)
    for step in steps:
        with torch.no_grad():
            cache.keep(step.text, score(policy, step.text, DPO.needs)[1])
    cache.flush()
    return cache


# --- plain -----------------------------------------------------------------------------------------------------------


def whole_logits(policy: Policy, encoded: Encoded, images: dict[str, Tensor]) -> Tensor:
    """One sequence through the whole model, logits [T, V] of every position, in float32."""
    ids = torch.tensor([encoded.input_ids], device=images["pixel_values"].device)
    pixels = images["pixel_values"].to(policy.network.dtype)
    return policy.network(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0].float()


def logp(logits_TV: Tensor, encoded: Encoded, chosen_N: Tensor | None = None) -> Tensor:
    """Sum of the response tokens' log-probabilities, or of other tokens in their places."""
    device = logits_TV.device
    targets = torch.tensor(encoded.input_ids[1:], device=device)
    mask = torch.tensor(encoded.response[1:], device=device)
    if chosen_N is not None:
        targets = targets.masked_scatter(mask, chosen_N)
    return (logits_TV[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0] * mask).sum()


def _parts(pinned: Tensor | None, step: Step) -> list[Tensor | None]:
    if pinned is None:
        return [None] * len(step.examples)
    return list(pinned.split([sum(example.preferred.response) for example in step.examples]))


def _choose(logits_TV: Tensor, encoded: Encoded) -> Tensor:
    mask = torch.tensor(encoded.response[1:], device=logits_TV.device)
    return logits_TV[:-1].argmax(-1)[mask]


def _stacked(task: str, rows: list[list[Tensor]]) -> Terms:
    """Rows of [preferred, text] or [preferred, text, noise] as the terms of a task."""
    names = ("preferred", "text", "noise_on_clean" if task == "released" else "noise")
    return Terms(**{name: torch.stack(column) for name, column in zip(names, zip(*rows))})


def plain(policy: Policy, task: str, *, checkpoint: bool = False) -> Arm:
    """Each sequence separately, full logits, vision each time: Eq. 3 (stage 1) or Eq. 5."""

    def sides(example: Example, chosen: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        terms = [
            logp(whole_logits(policy, side, example.images), side) for side in (example.preferred, example.dispreferred)
        ]
        if task == "eq5":
            noised = whole_logits(policy, example.preferred, example.noised)
            chosen = _choose(noised, example.preferred) if chosen is None else chosen
            terms.append(logp(noised, example.preferred, chosen))
        return terms, chosen

    def run(step: Step, pinned: Tensor | None = None) -> Tensor:
        policy_rows, reference_rows = [], []
        with checkpointing(policy, checkpoint):
            for example, part in zip(step.examples, _parts(pinned, step)):
                terms, chosen = sides(example, part)
                policy_rows.append(terms)
                with policy.reference():
                    reference_rows.append(sides(example, chosen)[0])
            loss = loss_of(task, _stacked(task, policy_rows), _stacked(task, reference_rows))
            loss.backward()
        return loss

    return Arm("plain, checkpointing" if checkpoint else "plain", task, run)


# --- released code ---------------------------------------------------------------------------------------------------


def released_code(policy: Policy, *, checkpoint: bool = False) -> Arm:
    """Ten vision passes, six language-model passes, full logits in float32.

    The policy's forward pass of the noised image records a graph that is never used. Each model takes y_l^n from its
    own noised logits and scores it on its clean ones.
    """

    def lay_out_labels(images: dict[str, Tensor]) -> None:
        policy.network.get_image_features(pixel_values=images["pixel_values"].to(policy.network.dtype))

    def sides(example: Example, pinned: Tensor | None) -> list[Tensor]:
        w, l = example.preferred, example.dispreferred
        clean = whole_logits(policy, w, example.images)
        lay_out_labels(example.images)
        preferred = logp(clean, w)
        noised = whole_logits(policy, w, example.noised)
        lay_out_labels(example.noised)
        text = logp(whole_logits(policy, l, example.images), l)
        return [preferred, text, logp(clean, w, _choose(noised, w) if pinned is None else pinned)]

    def run(step: Step, pinned: Tensor | None = None) -> Tensor:
        policy_rows, reference_rows = [], []
        with checkpointing(policy, checkpoint):
            for example, part in zip(step.examples, _parts(pinned, step)):
                policy_rows.append(sides(example, part))
                with policy.reference():
                    reference_rows.append(sides(example, part))
            loss = loss_of("released", *(_stacked("released", rows) for rows in (policy_rows, reference_rows)))
            loss.backward()
        return loss

    return Arm("released code, checkpointing" if checkpoint else "released code", "released", run)
