"""Distortions: what makes x^n of a picture x (paper, section 3.2). One file each.

A distortion is a callable with a ``space``:

- ``normalized``: it is called with the tensor that the model sees (the image processor's ``pixel_values`` of one
  record, any shape) and returns a tensor of the same shape.
- ``pixel``: it is called with the picture itself, [3, H, W] float32 in [0, 1] before padding and resizing, and returns
  [3, H', W'] around [0, 1], which :meth:`Distortion.to_bytes` turns into 8 bits. It is then fitted to x's own size: the
  number of image tokens may depend on the size of a picture, and x^n stands in the place of x.

Whatever is random comes from the generator, which depends on seed, epoch and record alone: a record gets the same x^n
whatever the batch size, the number of workers or of devices, and after a resume. Each picture of a record with several
is distorted by itself: in ``pixel`` space with a generator of its own, in ``normalized`` space as its part of the
record's tensor. A distortion that uses other records' pictures is given them by :meth:`Distortion.among`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Distortion(ABC):
    """Makes x^n of x. Subclasses say in which ``space`` they work and how."""

    space: Literal["normalized", "pixel"] = "normalized"

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The distorted x; ``x`` itself is left unchanged."""

    def among(self, pictures: Sequence[Image.Image]) -> Self:
        """The same distortion with access to all pictures of all records, in their order; they open when indexed."""
        return self

    def to_bytes(self, x: Tensor) -> Tensor:
        """A distorted picture [3, H, W] around [0, 1] as uint8: clamped and rounded."""
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def generator(*, seed: int, epoch: int, record: int, picture: int = 0) -> torch.Generator:
    """The source of randomness for one record in one epoch, or for a further picture of it (from 1)."""
    number = (seed * 1_000_003 + epoch) * 100_000_007 + record
    if picture:
        number = int.from_bytes(hashlib.sha256(f"{number} {picture}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


def distort_picture(distortion: Distortion, picture: Image.Image, source: torch.Generator) -> Image.Image:
    """The distorted 8-bit RGB picture, of the picture's own size: exactly what a ``pixel`` distortion trains on.

    A ``normalized`` distortion trains on the resized tensor; here it is applied to the picture's own pixels, to show a
    person what it does.
    """
    distorted = to_picture(distortion.to_bytes(distortion(to_tensor(picture), source)))
    return distorted if distorted.size == picture.size else ImageOps.fit(distorted, picture.size)


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_picture(x: Tensor) -> Image.Image:
    """[3, H, W] uint8 as a picture."""
    return Image.fromarray(x.permute(1, 2, 0).numpy())
