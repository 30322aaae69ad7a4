"""Reference log-probabilities of the text pairs, kept on disk: the reference does not change within a stage.

A value is stored when a step computes it and read in the epochs and runs after that, so the first epoch costs what it
costs without. What a value depends on is in its key: the bytes of every frozen weight, the model's configuration, the
code that scores, dtype, precision, device type and library versions name the folder; the tokens, the response marks
and the image tensors that enter the model name the record. Seed and batches are in the folder's key as well, since the
last digit of a sum depends on what a record is padded with: a run repeated with its cache is the same run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from povid.internals import attention_name
from povid.method.objectives import Terms
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceBatch
from povid.training.digest import tensor_digest

log = logging.getLogger(__name__)

SCORING_CODE = (
    "method/noise_dispreferred.py",
    "model/architectures.py",
    "model/fused.py",
    "model/loading.py",
    "model/packing.py",
    "model/policy.py",
    "training/scoring.py",
)
STEPS_KEPT_BACK = 64  # values stay on the device this long, since fetching one makes the host wait for it


def weights_digest(policy: Policy) -> str:
    """SHA-256 of every parameter and buffer that the reference can use: merged adapters and the original projector
    included, what is trained left out."""
    network = policy.network
    frozen: list[tuple[str, Tensor]] = [(name, p) for name, p in network.named_parameters() if not p.requires_grad]
    frozen += [(name, b) for name, b in network.named_buffers()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the interpreter's lock
        digests = threads.map(lambda entry: tensor_digest(*entry), sorted(frozen, key=lambda entry: entry[0]))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def folder_key(policy: Policy, **run: Any) -> str:
    """Everything but the record that a value depends on. ``run``: plain values such as precision, seed, batch size."""
    import transformers

    config = policy.network.config.to_dict()
    config.pop("_name_or_path", None)
    code = hashlib.sha256(b"".join((Path(__file__).parents[1] / name).read_bytes() for name in SCORING_CODE))
    parameter = next(policy.parameters())
    settings = {
        "weights": weights_digest(policy),
        "config": config,
        "code": code.hexdigest(),
        "packable": policy.packable,
        "architecture": policy.architecture.model_dump(),
        "fused": policy.settings.fused,
        "attention": attention_name(policy.network.config.get_text_config()),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "versions": [torch.__version__, transformers.__version__],
        "run": run,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class ReferenceCache:
    """The values of one key: JSON Lines files in ``folder/KEY``, one per writing process.

    Each line is a record: its digest, how many values it has, the values, and a checksum over all of that and the key.
    A line that fails its checksum is dropped, and its values are computed again. Safe under several processes and
    devices, since each appends to a file of its own.

    Args: folder: of all caches; key: from ``folder_key``; dtype: of the log-probabilities.
    """

    def __init__(self, folder: Path, key: str, *, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder / key[:32], dtype
        self.known: dict[str, list[float]] = {}
        self.dropped = 0
        self._pending: list[tuple[Sequence[str], Tensor]] = []
        self.load()

    def load(self) -> None:
        """Read what any process has stored under this key; what fails its checksum is dropped, counted and logged."""
        dropped = 0
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                if not line:  # what parts two writes
                    continue
                try:
                    digest, count, values, check = json.loads(line)
                    whole = len(values) == count and check == self._check(digest, values)
                except (ValueError, TypeError, RecursionError):  # torn by a kill, or damaged
                    whole = False
                if whole:
                    self.known.setdefault(digest, values)
                else:
                    dropped += 1
        if dropped > self.dropped:
            log.warning(
                "%s: lines that fail their checksum and are not used: %d; their values are computed again",
                self.folder,
                dropped - self.dropped,
            )
        self.dropped = dropped

    def _check(self, digest: str, values: Sequence[float]) -> str:
        return hashlib.sha256(json.dumps([self.folder.name, digest, values]).encode()).hexdigest()[:16]

    def find(self, batch: PreferenceBatch) -> Terms | None:
        """The reference's log-probabilities [B] of a batch's pairs, or None unless all of its records are known."""
        values = [self.known.get(digest) for digest in batch.digests]
        if not values or None in values:
            return None
        device = batch.pairs.input_ids_BT.device
        rows = torch.tensor(values, dtype=self.dtype).T.contiguous().to(device, non_blocking=True)
        return Terms(*rows)

    def keep(self, batch: PreferenceBatch, reference: Terms) -> None:
        """Note a batch's values; they are fetched from the device and written some steps later."""
        sides = [side for side in (reference.preferred, reference.text) if side is not None]
        self._pending.append((batch.digests, torch.stack(sides).detach()))
        if len(self._pending) >= STEPS_KEPT_BACK:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, down to the disk."""
        if not self._pending:
            return
        columns = torch.cat([values for _, values in self._pending], dim=1).T.tolist()
        digests = [digest for names, _ in self._pending for digest in names]
        self._pending.clear()
        fresh = {
            digest: values
            for digest, values in zip(digests, columns)
            if digest not in self.known and all(map(math.isfinite, values))
        }
        self.known |= fresh
        lines = "".join(
            f"\n{json.dumps([digest, len(values), values, self._check(digest, values)])}"
            for digest, values in fresh.items()
        )
        if lines:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
                    file.write(lines + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a run does not end for this: it has its values in memory
                log.warning(
                    "%s cannot be written (%s); later runs will compute these values again", self.folder, error.strerror
                )
