"""One way to make RGB of a picture, whoever reads it: a model in this process, a served one or a page.

A photograph's EXIF rotation is not applied, as LLaVA does not apply it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB, eight bits a channel; its transparency is dropped.

    Of sixteen bits the upper eight are kept. Pillow does so for colour, but cuts shades of grey off at 255, which makes
    nearly all of them white.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")
