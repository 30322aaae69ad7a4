"""Another record's picture: nothing that a response says of its own picture can be seen in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from povid.fault import Fault
from povid.method.distortions import Distortion, to_tensor


class OtherPicture(Distortion):
    """x^n is the picture of a random other record, never x itself, also where several records share x.

    All pictures of all records are drawn from, so a record with several may get another of its own.
    """

    space = "pixel"

    def __init__(self) -> None:
        self.pictures: Sequence[Image.Image] = ()

    def among(self, pictures: Sequence[Image.Image]) -> Self:
        found = copy.copy(self)
        found.pictures = pictures
        return found

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to [3, H', W'].

        Raises:
            Fault: no record has a picture other than x.
        """
        count = len(self.pictures)
        first = int(torch.randint(max(count, 1), (), generator=generator))
        for step in range(count):
            other = to_tensor(self.pictures[(first + step) % count])
            if not torch.equal(other, x):
                return other
        raise Fault(
            f"the data's {count} records show no picture but this one, and noise=other_picture needs two; add records "
            "or choose another noise"
        )
