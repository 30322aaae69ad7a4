"""What every hallucinator here knows of the paper's three causes (section 3.1), whatever its sentences look like.

*Co-occurrence*: which absent object is likely beside those that are there (:class:`Statistics`). *Relations and
attributes*: which word becomes which (:func:`opposites`). *Numbers*: which count is mistaken for which
(:func:`miscounts`). How often each occurs, and how often a response becomes longer or shorter, is :class:`Shares`.

How a sentence is taken apart and put together again is not shared: the embedded world builds its captions from mentions
and knows their structure (:mod:`povid.scenes.hallucination`), free text has to be read first
(:mod:`povid.dispreference.rewriting`).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from povid.preferences.differences import ATTRIBUTES as ATTRIBUTE_WORDS
from povid.preferences.differences import COCO_OBJECTS, everyday_names, mentions, words

Cause = Literal["co-occurrence", "relation", "attribute"]
Share = Annotated[float, Field(ge=0, le=1)]
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
    """What ``word`` can become under ``pairs``: the ``usual`` words if there are any, else all of them."""
    found = [other for pair in pairs for one, other in (pair, pair[::-1]) if one == word]
    return [other for other in found if other in usual] or found


def miscounts(number: int) -> list[int]:
    """The numbers next to ``number`` (at least 1) that take a plural."""
    return [near for near in (number - 1, number + 1) if near > 1]


class Shares(BaseModel):
    """How often a hallucination takes which form.

    Attributes:
        object_share: share of captions in which an object is hallucinated; in the others a relation, a count or an
            attribute is wrong.
        swap_share: share of hallucinated objects that replace one true object. Half of the others are added (the
            response becomes longer), half replace two (it becomes shorter), so that no preference for length is learnt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    object_share: Share = 0.7
    swap_share: Share = 0.7

    @property
    def longer(self) -> float:
        """Share of hallucinated objects that are added; as many replace two."""
        return (1 - self.swap_share) / 2


@dataclass(slots=True)
class Statistics:
    """Which objects occur together, how often each occurs, and what captions say of them.

    ``present`` holds the objects of each picture; ``pictures[a]`` counts pictures with a, ``together[a][b]`` pictures
    with both; ``looks[a]`` counts attributes said of a, ``said`` counts words; ``names`` maps words to objects.
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

    def companions(self, there: Collection[str]) -> list[tuple[str, float]]:
        """Absent objects with the largest P(absent | one that is ``there``), the likeliest first.

        Ties keep the order of the objects that suggest them. Empty if nothing is known to occur with these.
        """
        odds: dict[str, float] = {}
        for name in there:
            for other in self.together.get(name, {}):
                if other not in there:
                    odds[other] = max(odds.get(other, 0.0), self.likelihood(other, name))
        return sorted(odds.items(), key=lambda entry: -entry[1])

    def likely(self, there: Collection[str]) -> list[tuple[str, float]]:
        """The :meth:`companions` of what is there; without any, the most frequent absent objects with their shares."""
        if found := self.companions(sorted(there)):
            return found
        usual = {name: count for name, count in self.pictures.items() if name not in there}
        usual = usual or {name: 1 for name in COCO_OBJECTS if name not in there}
        total = sum(usual.values())
        odds = [(name, count / total) for name, count in usual.items()]
        return sorted(odds, key=lambda entry: (-entry[1], entry[0]))

    def leader(self, name: str, among: Sequence[str]) -> int | None:
        """Position of the object ``among`` these that suggests ``name`` most: habit names it right after that one.

        None if nothing suggests it.
        """
        odds = [self.likelihood(name, other) for other in among]
        return odds.index(max(odds)) if any(odds) else None


def learn(
    present: Mapping[str, Sequence[str]], captions: Iterable[str] = (), synonyms: Mapping[str, str] | None = None
) -> Statistics:
    """Count objects and pairs over the pictures of ``present``, and words and attributes over ``captions``.

    ``synonyms`` (word to object) are further words for objects, which take precedence over the everyday ones.
    """
    pictures: Counter[str] = Counter()
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    learned = Statistics({name: frozenset(listed) for name, listed in present.items()}, pictures, together)
    for listed in learned.present.values():
        pictures.update(sorted(listed))
        for one, other in itertools.permutations(sorted(listed), 2):
            together[one][other] += 1
    learned.names = everyday_names() | {n: n for n in learned.pictures if n != "orange"} | dict(synonyms or {})
    for caption in captions:
        learned.said.update(words(caption))
        for mention in mentions(caption, learned.names):
            before = words(caption[: mention.start])[-1:]
            learned.looks[mention.name].update(word for word in before if word in ATTRIBUTE_WORDS)
    return learned


def draw(likely: Sequence[tuple[str, float]], rng: random.Random) -> str:
    """One of the names, drawn by their odds."""
    return rng.choices([name for name, _ in likely], [odds + 1e-6 for _, odds in likely])[0]
