"""What every hallucinator here knows of the paper's three causes (section 3.1), whatever its sentences look like.

*Co-occurrence*: which absent object is likely beside those that are there (:class:`Statistics`). *Relations and
attributes*: what a word is exchanged for (:func:`opposites`). *Numbers*: what a count is taken for (:func:`miscounts`).

How a sentence is taken apart and put together is not shared: the embedded world builds its captions from mentions and
knows their structure (:mod:`povid.scenes.hallucination`), free text has to be read first
(:mod:`povid.dispreference.cooccurrence`, which rewrites the embedded world's captions as well).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Cause = Literal["co-occurrence", "relation", "attribute"]
RELATIONS = (
    ("left", "right"),
    ("above", "below"),
    ("in front of", "behind"),
    ("on top of", "under"),
    ("inside", "outside"),
    ("next to", "far away from"),
    ("beside", "behind"),
    ("near", "far from"),
    ("foreground", "background"),
    ("standing", "sitting"),
    ("stands", "sits"),
    ("walking", "running"),
    ("open", "closed"),
    ("before", "after"),
    ("towards", "away from"),
)
ATTRIBUTES = (
    ("big", "small"),
    ("large", "small"),
    ("tall", "short"),
    ("young", "old"),
    ("wooden", "metal"),
    ("empty", "full"),
    ("new", "old"),
    ("long", "short"),
    ("sunny", "cloudy"),
    ("clear", "cloudy"),
    ("clean", "dirty"),
    ("wet", "dry"),
    ("dark", "bright"),
    ("happy", "sad"),
    ("striped", "plain"),
    ("sandy", "rocky"),
    ("brick", "wooden"),
)


def opposites(word: str, pairs: Iterable[tuple[str, str]], usual: Collection[str] = ()) -> list[str]:
    """What ``word`` becomes under ``pairs``: those that are ``usual`` where there are any, else all; empty if none."""
    found = [other for pair in pairs for one, other in (pair, pair[::-1]) if one == word]
    return [other for other in found if other in usual] or found


def miscounts(number: int) -> list[int]:
    """The numbers next to ``number`` (at least 1) that need a plural."""
    return [near for near in (number - 1, number + 1) if near > 1]


@dataclass(slots=True)
class Statistics:
    """Which objects come together, how often each comes, and what captions call them.

    ``present`` holds the objects of each picture; ``pictures[a]`` counts pictures with a, ``together[a][b]`` pictures
    with both; ``looks[a]`` counts attributes said of a and ``said`` words; ``names`` are the words for objects.
    """

    present: dict[str, frozenset[str]] = field(default_factory=dict)
    pictures: Mapping[str, float] = field(default_factory=Counter)
    together: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: defaultdict(Counter))
    looks: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    said: Counter[str] = field(default_factory=Counter)
    names: Mapping[str, str] | None = None

    def likelihood(self, name: str, beside: str) -> float:
        """P(``name`` is in a picture | ``beside`` is)."""
        return self.together.get(beside, {}).get(name, 0) / self.pictures[beside] if beside in self.pictures else 0.0

    def companions(self, there: Collection[str], banned: Collection[str] = ()) -> list[tuple[str, float]]:
        """Absent objects, the likeliest first, with the largest P(absent | one that is ``there``).

        Equals keep the order of those that suggest them. Empty where nothing is known to come with these.
        """
        odds: dict[str, float] = {}
        for name in there:
            for other in self.together.get(name, {}):
                if other not in banned and other not in there:
                    odds[other] = max(odds.get(other, 0.0), self.likelihood(other, name))
        return sorted(odds.items(), key=lambda entry: -entry[1])
