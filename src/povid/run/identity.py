"""What a number depends on: the identity of a stage and of a run.

An identity is a mapping of named parts. A setting is a part under its key in the configuration, with its value; content
(records, pictures, weights, adapters) is a part under a name, with a digest. Two computations with equal parts give the
same numbers; where parts differ, their names say why a saved state cannot be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from povid.fault import Fault

# The settings that change no number by themselves: folders (their content is compared instead), workers, logging,
# samples, how often a stage is saved and validated. A benchmark is compared with the answers on disk by the suite.
# What decides which adapter is kept is a part of its own (run/content.py).
FREE = (
    "adapters",
    "benchmarks",
    "checkpoint",
    "data.benchmarks",
    "data.cache_mb",
    "data.folder",
    "data.images",
    "data.objects",
    "data.preferences",
    "data.prepare.folder",
    "data.probe",
    "data.root",
    "data.source",
    "data.synonyms",
    "data.workers",
    "dispreference.objects",
    "dispreference.synonyms",
    "generation.batch_size",
    "generation.engine.folder",
    "init_from",
    "judge",
    "launcher",
    "logger",
    "model.api_key_env",
    "model.ask_again",
    "model.backoff",
    "model.budget",
    "model.cache",
    "model.concurrency",
    "model.gradient_checkpointing",
    "model.image_tokens",
    "model.input_price",
    "model.longest_wait",
    "model.output_price",
    "model.path",
    "model.prepare",
    "model.requests_per_minute",
    "model.retries",
    "model.timeout",
    "model.token_budget",
    "optimized_metric",
    "outputs",
    "resume",
    "samples",
    "samples_every",
    "trainer.check_val_every_n_epoch",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
)
SHOWN = 8  # differences in a message


def is_free(key: str) -> bool:
    """Whether a setting changes no number by itself."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


@dataclass(frozen=True)
class Identity:
    """``parts``: everything that can change a number. ``row``: the same with nothing that the seed decides, for runs
    whose scores may be averaged."""

    parts: Mapping[str, Any]
    row: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        return digest(self.parts)

    @cached_property
    def unseeded(self) -> str:
        return digest(self.row)

    def record(self) -> dict[str, Any]:
        """What is written to disk; :func:`differences` compares its ``parts``."""
        return {"digest": self.digest, "unseeded": self.unseeded, "parts": dict(self.parts), "row": dict(self.row)}

    def check(self, recorded: Any, what: str, cure: str) -> None:
        """Raise a Fault that names the differences unless ``what`` was made under this identity.

        ``recorded`` is what stands beside it on disk; None where an earlier version wrote nothing.
        """
        if not isinstance(recorded, Mapping) or not isinstance(recorded.get("parts"), Mapping):
            raise Fault(
                f"{what} was written by an earlier version, which did not record what it was made with; move it away "
                "to compute it again, or start in another folder"
            )
        found = differences(recorded["parts"], self.parts)
        if found:
            raise Fault(f"{what} was made with something else ({'; '.join(found)}); {cure}")


def identity(parts: Mapping[str, Any], row: Mapping[str, Any]) -> Identity:
    """An identity of plain containers, equal to itself after it has been on disk."""
    return Identity(json.loads(json.dumps(parts)), json.loads(json.dumps(row)))


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts that differ, each with both values; the first few, and how many more there are."""
    missing = object()
    names = [name for name in sorted({*there, *now}) if there.get(name, missing) != now.get(name, missing)]
    said = [f"{name} was {there.get(name)!r} and is now {now.get(name)!r}" for name in names[:SHOWN]]
    return said + ([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that name a value made of plain containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a configuration; an empty mapping is a leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
