"""Captions of a scene, and one-word answers about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from povid.preferences.differences import plural, with_article
from povid.scenes.scene import Scene, Thing
from povid.scenes.vocabulary import ANCHOR, CONTEXT_OF, KINDS, NAMES, PARTNER

CAPTION_PROMPT = "Describe this image."
APART = 20  # pixels between two things before one is called left or right of the other
_NUMBERS = {2: "two", 3: "three"}
_TEMPLATES = ("This image shows {}.", "The picture contains {}.", "{context} scene with {}.")


@dataclass(frozen=True, slots=True)
class Mention:
    """An object in a caption's list: its COCO name, the word used for it, and the number stated."""

    name: str
    word: str
    count: int

    def __str__(self) -> str:
        return with_article(self.word) if self.count == 1 else f"{_NUMBERS[self.count]} {plural(self.word)}"


@dataclass(frozen=True, slots=True)
class Remark:
    """A caption's second sentence about the listed object ``subject``.

    ``value`` is ``left`` or ``right`` (of the listed object ``other``) or, without ``other``, ``small`` or ``large``.
    """

    subject: str
    value: str
    other: str = ""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption before it is written out: a template, the list of mentions and at most one remark."""

    template: int
    context: str
    mentions: tuple[Mention, ...]
    remark: Remark | None = None

    def __str__(self) -> str:
        *front, last = map(str, self.mentions)
        listed = f"{', '.join(front)} and {last}" if front else last
        text = _TEMPLATES[self.template].format(listed, context=with_article(self.context).capitalize())
        if self.remark is None:
            return text
        words = {mention.name: mention.word for mention in self.mentions}
        said = (
            f"to the {self.remark.value} of the {words[self.remark.other]}" if self.remark.other else self.remark.value
        )
        return f"{text} The {words[self.remark.subject]} is {said}."

    def exchange(self, old: str, new: Mention) -> Caption:
        """The caption with ``new`` in place of the object ``old``, in the list and in the remark."""
        remark = self.remark
        if remark:
            remark = replace(
                remark,
                subject=new.name if remark.subject == old else remark.subject,
                other=new.name if remark.other == old else remark.other,
            )
        return replace(self, remark=remark, mentions=tuple(new if m.name == old else m for m in self.mentions))


def draw_word(rng: np.random.Generator, name: str, length: int | None = None) -> str:
    """A name for the object, most often its COCO name; with ``length`` only names of that many words."""
    words = [word for word in KINDS[name].names if length is None or len(word.split()) == length]
    return words[0] if len(words) == 1 or rng.random() < 0.65 else str(rng.choice(words[1:]))


def draw_order(rng: np.random.Generator, scene: Scene) -> list[str]:
    """The scene's objects in the order in which they are listed: partners follow their anchors."""
    leaders = [name for name in scene.names if ANCHOR.get(name) not in scene.names]
    order: list[str] = []
    for name in rng.permutation(leaders).tolist():
        order.append(name)
        if PARTNER.get(name) in scene.names:
            order.append(PARTNER[name])
    return order


def draw_caption(rng: np.random.Generator, scene: Scene) -> Caption:
    """A true and complete caption of the scene: every object is listed with its number."""
    things = {thing.name: thing for thing in scene.things}
    order = draw_order(rng, scene)
    mentions = tuple(Mention(name, draw_word(rng, name), things[name].count) for name in order)
    remark = draw_remark(rng, [things[name] for name in order])
    return Caption(int(rng.integers(len(_TEMPLATES))), scene.context, mentions, remark)


def draw_remark(rng: np.random.Generator, things: Sequence[Thing]) -> Remark | None:
    """A true relation of the first two listed things (more often), the size of the last, or nothing."""
    first, second, *_, last = *things, things[-1]
    chance = rng.random()
    if chance < 0.65 and first.count == second.count == 1 and abs(first.middle - second.middle) >= APART:
        return Remark(first.name, "left" if first.middle < second.middle else "right", second.name)
    if chance < 0.9 and last.count == 1 and last.size:
        return Remark(last.name, last.size)
    return None


def question(name: str) -> str:
    """POPE's question with the article that fits."""
    return f"Is there {with_article(name)} in the image?"


def draw_questions(rng: np.random.Generator, scene: Scene, number: int) -> list[tuple[str, str]]:
    """``number`` pairs (question, ``Yes`` or ``No``), about half of them yes; half the absent objects are of the
    scene's own context."""
    present = rng.permutation(scene.names).tolist()[: number // 2]
    absent = [name for name in rng.permutation(NAMES).tolist() if name not in scene.names]
    near = [name for name in absent if CONTEXT_OF[name] == scene.context]
    missing = near[: (number - len(present)) // 2]
    missing += [name for name in absent if name not in missing][: number - len(present) - len(missing)]
    return [(question(name), "Yes") for name in present] + [(question(name), "No") for name in missing]
