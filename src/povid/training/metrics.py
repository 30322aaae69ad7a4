"""Training metrics under TRL's names, so that dashboards saved for TRL's DPO show a run of this project.

They stay on the device until several steps' are fetched together, since every fetch makes the host wait for the device.

Shape suffix: B = examples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import Literal

import torch
from torch import Tensor

from povid.method.objectives import DISPREFERENCES, Objective, Outcome, Terms

# The metrics of which one direction is better; those of single dispreferred responses end with their names.
BETTER: dict[str, Literal["low", "high"]] = {"loss": "low", "rewards/margins": "high", "rewards/accuracies": "high"}


def measure(
    outcome: Outcome,
    policy: Terms,
    reference: Terms | None,
    tokens: Terms,
    observed: Mapping[str, Tensor],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The metrics of a batch by name: means over its examples, float32 scalars on its device, without gradient.

    ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` and ``rewards/accuracies`` are of
    ``scale`` x log pi/ref, the same scale for every response and stage; without a reference, they are of the rewards
    that the objective returns. With several dispreferred responses, ``rejected`` is their mean, and each has its own
    metrics too, which end with its name (``rewards/rejected_text``, ``rewards/margins_noise``).
    ``weighted_rewards/...``: as they stand inside the loss. ``logps/...``: log-probabilities. ``kl``: an estimate of
    KL(pi || ref) in nats per token, at least 0: r - 1 - log r (Schulman's k3), r the geometric mean of ref/pi over the
    tokens of y_w. These are the data's tokens and not the policy's own samples, so it shows how far the policy has
    moved there.

    Args:
        outcome: of the objective.
        policy, reference: log-probabilities [B] of the scored terms; no reference where the objective needs none.
        tokens: the number of tokens of each response [B].
        observed: further quantities [B] by name (``observed`` of :func:`povid.training.scoring.score`).
        scale: coefficient of log pi/ref in rewards (:attr:`povid.method.objectives.Objective.scale`).
    """
    labels = _labels(policy)
    logps = {label: getattr(policy, term).detach().float() for term, label in labels.items()}
    weighted = {label: reward_B.detach().float() for label, reward_B in outcome.rewards.items()}
    means = {"loss": outcome.loss_B.detach().float()}
    if reference is None:
        means |= _compared("rewards", weighted)
    else:
        before = {label: getattr(reference, term).detach().float() for term, label in labels.items()}
        means |= _compared("rewards", {label: scale * (logps[label] - before[label]) for label in logps})
        means |= _sides("weighted_rewards", weighted)
        if "preferred" in logps and tokens.preferred is not None:
            log_r_B = (before["preferred"] - logps["preferred"]) / tokens.preferred.clamp(min=1)
            means["kl"] = log_r_B.expm1() - log_r_B
    means |= _sides("logps", logps)
    means |= {name: value_B.detach().float() for name, value_B in observed.items()}
    return {name: value_B.mean() for name, value_B in means.items()}


def directions(objective: Objective, terms: Set[str]) -> dict[str, Literal["low", "high"]]:
    """The metrics of an objective that reads ``terms`` of which one direction is better, and that direction.

    Nothing is scored: the objective is called on one example whose log-probabilities are 0.
    """
    zeros = Terms(**{term: torch.zeros(1) for term in terms})
    tokens = Terms(**{term: torch.ones(1) for term in terms})
    reference = zeros if objective.reference else None
    found = measure(objective(zeros, reference, tokens), zeros, reference, tokens, {}, objective.scale)
    return {
        name: better
        for name in found
        for beginning, better in BETTER.items()
        if name == beginning or name.startswith(f"{beginning}_")
    }


def _labels(policy: Terms) -> dict[str, str]:
    """What each scored term is called: preferred, or the dispreference that it belongs to if no other term does."""
    scored = [term for term, value in policy._asdict().items() if value is not None]
    kinds = [DISPREFERENCES.get(term, term) for term in scored]
    return {term: kind if kinds.count(kind) == 1 else term for term, kind in zip(scored, kinds)}


def _sides(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``chosen``, and ``rejected`` of every dispreferred response: their mean, and by name if there are several."""
    found = {f"{prefix}/chosen": values["preferred"]} if "preferred" in values else {}
    rejected = {label: value_B for label, value_B in values.items() if label != "preferred"}
    if rejected:
        found[f"{prefix}/rejected"] = torch.stack([*rejected.values()]).mean(0)
    if len(rejected) > 1:
        found |= {f"{prefix}/rejected_{label}": value_B for label, value_B in rejected.items()}
    return found


def _compared(prefix: str, rewards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sides, and how far (margins) and how often (accuracies) the chosen one is above each rejected one."""
    found = _sides(prefix, rewards)
    chosen_B = found.get(f"{prefix}/chosen")
    if chosen_B is not None:
        for name in [name for name in found if name.startswith(f"{prefix}/rejected")]:
            ending = name.removeprefix(f"{prefix}/rejected")
            found[f"{prefix}/margins{ending}"] = chosen_B - found[name]
            found[f"{prefix}/accuracies{ending}"] = (chosen_B > found[name]).float()
    return found


class Window:
    """The metrics of the steps since the last logging step.

    ``values``: what was fetched, by name, each a list with a number per step and the mean over all processes.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Note a step's scalars; nothing is fetched."""
        for name, value in metrics.items():
            self._waiting.setdefault(name, []).append(value.detach().float())

    def settle(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Fetch what is on the device, in one reduction (``reduce`` takes a tensor to its mean over the processes)."""
        if not self._waiting:
            return
        counts = {name: len(values) for name, values in self._waiting.items()}
        every = [value for values in self._waiting.values() for value in values]
        # the norm of gradients that are offloaded lies in the machine's memory
        flat = reduce(torch.stack([value.to(every[0].device) for value in every])).tolist()
        self._waiting = {}
        for name, count in counts.items():
            self.values.setdefault(name, []).extend(flat[:count])
            del flat[:count]

    def take(self) -> dict[str, float]:
        """The means over the steps by name; the next window begins."""
        means = {name: math.fsum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means
