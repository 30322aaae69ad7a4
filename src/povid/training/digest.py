"""Digests of tensors and records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from povid.model.packing import Encoded


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def record_digest(preferred: Encoded, dispreferred: Encoded, images: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that enters the model for one record: token ids, response marks, processed image tensors."""
    digest = hashlib.sha256()
    for side in (preferred, dispreferred):
        digest.update(json.dumps([side.input_ids, [int(mark) for mark in side.response]]).encode())
    for name in sorted(images):
        digest.update(tensor_digest(name, images[name]))
    return digest.hexdigest()
