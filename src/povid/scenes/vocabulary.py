"""What can be seen in the embedded world: 36 objects with COCO's names in six contexts.

Every context has three pairs (anchor, partner). Where the base model learns, the partner nearly always stands beside
its anchor, so a model that has learnt the habit names it even where it is missing: the paper's object co-occurrence.
Every object has at least one name of a single word, so that any object can take another's place in a sentence without
changing its number of words. All forms survive CHAIR's tokeniser, singulariser and table of double words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object: its COCO name (CHAIR's node word), further names, and the code point of its OpenMoji glyph."""

    name: str
    synonyms: tuple[str, ...]
    glyph: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a caption may use, the COCO name first."""
        return (self.name, *self.synonyms)


def _kind(glyph: str, names: str) -> Kind:
    first, *others = names.split(", ")
    return Kind(first, tuple(others), glyph)


CONTEXTS: dict[str, tuple[tuple[Kind, Kind], ...]] = {
    "kitchen": (
        (_kind("1F52A", "knife, blade"), _kind("1F944", "spoon, teaspoon")),
        (_kind("1F355", "pizza"), _kind("1F377", "wine glass, goblet")),
        (_kind("1F369", "donut, doughnut"), _kind("2615", "cup, mug")),
    ),
    "street": (
        (_kind("1F697", "car, automobile"), _kind("1F6A6", "traffic light, stoplight")),
        (_kind("1F69A", "truck, lorry"), _kind("1F3CD", "motorcycle, motorbike")),
        (_kind("1F6B2", "bicycle, bike"), _kind("1F392", "backpack, rucksack")),
    ),
    "farm": (
        (_kind("1F404", "cow, calf"), _kind("1F40E", "horse, pony")),
        (_kind("1F411", "sheep, lamb"), _kind("1F415", "dog, puppy")),
        (_kind("1F408-200D-2B1B", "cat, kitten"), _kind("1F426", "bird")),
    ),
    "office": (
        (_kind("1F4BB", "laptop, notebook"), _kind("1F5B1", "mouse")),
        (_kind("1F4D5", "book, novel"), _kind("1F4F1", "cell phone, phone")),
        (_kind("2328", "keyboard"), _kind("23F0", "clock")),
    ),
    "living room": (
        (_kind("1F6CB", "couch, sofa"), _kind("1F4FA", "tv, television")),
        (_kind("1FA91", "chair"), _kind("1FAB4", "potted plant, houseplant")),
        (_kind("1F6CF", "bed"), _kind("1F9F8", "teddy bear, teddy")),
    ),
    "beach": (
        (_kind("26F5", "boat, sailboat"), _kind("26F1", "umbrella, parasol")),
        (_kind("1FA81", "kite"), _kind("1F94F", "frisbee, disc")),
        (_kind("1F34C", "banana"), _kind("1F37E", "bottle, flask")),
    ),
}

KINDS: dict[str, Kind] = {kind.name: kind for pairs in CONTEXTS.values() for pair in pairs for kind in pair}
NAMES: tuple[str, ...] = tuple(KINDS)
PARTNER: dict[str, str] = {anchor.name: partner.name for pairs in CONTEXTS.values() for anchor, partner in pairs}
ANCHOR: dict[str, str] = {partner: anchor for anchor, partner in PARTNER.items()}
CONTEXT_OF: dict[str, str] = {
    kind.name: context for context, pairs in CONTEXTS.items() for pair in pairs for kind in pair
}
ANCHORS: dict[str, tuple[str, ...]] = {
    context: tuple(anchor.name for anchor, _ in pairs) for context, pairs in CONTEXTS.items()
}


def synonyms_file() -> str:
    """The vocabulary in the form of CHAIR's ``synonyms.txt``: one line per object, its COCO name first."""
    return "".join(", ".join(kind.names) + "\n" for kind in KINDS.values())
