"""A scene as a list of things: what is there, how many, how large and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from povid.scenes.vocabulary import ANCHORS, NAMES, PARTNER

SIDE = 96  # width and height of a picture in pixels
SMALL, LARGE = 22, 32  # a thing of at most / at least this many pixels is called small / large
SIZES = tuple(range(20, 37, 2))
BASE_PARTNER = 0.95  # P(partner | anchor) where the base model learns
HARD_PARTNER = 0.35  # P(partner | anchor) in preferences, tuning and evaluation

Size = Literal["small", "", "large"]


@dataclass(frozen=True, slots=True)
class Thing:
    """One kind of object in a scene. ``boxes`` holds (left, top, side) in pixels for each of its copies."""

    name: str
    boxes: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> int:
        return len(self.boxes)

    @property
    def size(self) -> Size:
        """The word for its size, or "" for a medium one."""
        side = self.boxes[0][2]
        return "small" if side <= SMALL else "large" if side >= LARGE else ""

    @property
    def middle(self) -> float:
        """Horizontal middle of its only or first copy, in pixels from the left."""
        left, _, side = self.boxes[0]
        return left + side / 2


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is painted. ``ground`` seeds its background; ``things`` have different names."""

    context: str
    things: tuple[Thing, ...]
    ground: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)


def draw_scene(rng: np.random.Generator, partner: float) -> Scene:
    """Draw a scene of three to seven things.

    One to three anchors of one context appear. Each brings its partner with probability ``partner``; where it does
    not, a stand-in from elsewhere often takes the place, so that pictures with and without partners are about as full.
    Stand-ins are partners without their anchor, so P(partner | anchor) is exactly ``partner``.
    """
    context = list(ANCHORS)[rng.integers(len(ANCHORS))]
    anchors = rng.permutation(ANCHORS[context])[: rng.choice([1, 2, 3], p=[0.15, 0.6, 0.25])].tolist()
    strangers = rng.permutation([PARTNER[a] for pair in ANCHORS.values() for a in pair if a not in anchors]).tolist()
    names: list[str] = []
    for anchor in anchors:
        names.append(anchor)
        if rng.random() < partner:
            names.append(PARTNER[anchor])
        elif rng.random() < 0.6:
            names.append(strangers.pop())
    if rng.random() < 0.3:
        names.append(strangers.pop())
    while len(names) < 3:  # POPE asks for three objects of every picture
        names.append(strangers.pop())
    doubled = rng.choice(names) if len(names) < 6 and rng.random() < 0.3 else None
    taken: list[tuple[int, int, int]] = []
    things = [
        Thing(name, tuple(_place(rng, taken, side) for _ in range(2 if name == doubled else 1)))
        for name in names
        for side in [int(rng.choice(SIZES))]
    ]
    return Scene(context, tuple(things), int(rng.integers(2**31)))


def draw_contextless(rng: np.random.Generator) -> Scene:
    """A scene of six things drawn without any habit, to train the vision tower."""
    taken: list[tuple[int, int, int]] = []
    things = [
        Thing(str(name), (_place(rng, taken, int(rng.choice(SIZES))),)) for name in rng.choice(NAMES, 6, replace=False)
    ]
    return Scene("", tuple(things), int(rng.integers(2**31)))


def _place(rng: np.random.Generator, taken: list[tuple[int, int, int]], side: int) -> tuple[int, int, int]:
    """The one of sixteen random places that earlier things cover least."""
    corners = rng.integers(0, SIDE - side + 1, (16, 2))
    overlap = np.zeros(16)
    for left, top, other in taken:
        across = np.minimum(corners[:, 0] + side, left + other) - np.maximum(corners[:, 0], left)
        down = np.minimum(corners[:, 1] + side, top + other) - np.maximum(corners[:, 1], top)
        overlap += np.clip(across, 0, None) * np.clip(down, 0, None)
    left, top = corners[int(overlap.argmin())].tolist()
    taken.append((left, top, side))
    return left, top, side
