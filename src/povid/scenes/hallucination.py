"""Writes hallucinations into true captions, by the paper's three causes (section 3.1).

*Co-occurrence*: a partner that habit expects and the picture lacks. Mostly it takes the place of a true object, so that
preferred and dispreferred name equally many; the rest is balanced between adding it (the dispreferred is longer) and
letting it stand for two true objects (the dispreferred is shorter). Neither saying less nor saying more is rewarded:
what is left to learn is to look. *Relation*: left for right. *Attribute*: a wrong size or number.

What is plausible under each cause comes from :mod:`povid.dispreference.causes`, the habits from the world's
construction. The edits are of this world: they keep lengths in balance, which needs a caption's structure. What the
hallucinator for free text makes of the same captions, with habits that it learns from lists of objects, is
``dispreference=cooccurrence``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from povid.dispreference.causes import ATTRIBUTES, RELATIONS, Cause, Statistics, miscounts, opposites
from povid.scenes.language import Caption, Mention, draw_caption, draw_word, question
from povid.scenes.scene import BASE_PARTNER, Scene
from povid.scenes.vocabulary import ANCHOR, CONTEXT_OF, NAMES, PARTNER

# What the base model has learnt; tests find the same by counting its scenes.
HABITS = Statistics(
    pictures=dict.fromkeys(ANCHOR.values(), 1.0),
    together={anchor: {partner: BASE_PARTNER} for anchor, partner in PARTNER.items()},
)
_SAID = ("left", "right", "small", "large")


@dataclass(frozen=True, slots=True)
class Pair:
    """A preferred and a dispreferred response to ``prompt``; ``edit`` is swap, add, merge, flip, count or answer."""

    prompt: str
    preferred: str
    dispreferred: str
    cause: Cause
    edit: str


def draw_caption_pair(rng: np.random.Generator, scene: Scene, prompt: str, swap_share: float) -> Pair:
    """A complete true caption and one with a hallucination.

    ``swap_share`` is the share of co-occurrence hallucinations that swap; with 1 both captions always have the same
    number of words, for relations and attributes never change it.
    """
    caption = draw_caption(rng, scene)
    chance = rng.random()
    if chance < 0.15 and caption.remark and caption.remark.other:
        wrong = _flipped(caption)
        return Pair(prompt, str(caption), str(wrong), "relation", "flip")
    if 0.15 <= chance < 0.3:
        if caption.remark and not caption.remark.other:
            wrong = _flipped(caption)
            return Pair(prompt, str(caption), str(wrong), "attribute", "flip")
        remarked = (caption.remark.subject, caption.remark.other) if caption.remark else ()
        free = [mention for mention in caption.mentions if mention.name not in remarked]
        if free:
            told = free[rng.integers(len(free))]
            wrong = caption.exchange(told.name, replace(told, count=miscounts(told.count)[0]))
            return Pair(prompt, str(caption), str(wrong), "attribute", "count")
    caption, wrong, edit = _co_occurrence(rng, scene, caption, swap_share)
    return Pair(prompt, str(caption), str(wrong), "co-occurrence", edit)


def _flipped(caption: Caption) -> Caption:
    pairs = RELATIONS if caption.remark.other else ATTRIBUTES
    return replace(caption, remark=replace(caption.remark, value=opposites(caption.remark.value, pairs, _SAID)[0]))


def _co_occurrence(
    rng: np.random.Generator,
    scene: Scene,
    caption: Caption,
    swap_share: float,
) -> tuple[Caption, Caption, str]:
    expected = [name for name, _ in HABITS.companions(scene.names)]
    ghosts = rng.permutation(expected or _absent(scene, scene.context)).tolist()
    chance = rng.random()
    if chance >= swap_share:
        ghost = ghosts[0]
        place = 1 + next((i for i, m in enumerate(caption.mentions) if m.name == ANCHOR.get(ghost)), 0)
        if chance < (1 + swap_share) / 2:
            return caption, _insert(caption, place, Mention(ghost, draw_word(rng, ghost), 1)), "add"
        dropped = rng.permutation([name for name in scene.names if PARTNER.get(name) != ghost])[:2].tolist()
        if any(_remarked(caption, name) for name in dropped):
            caption = replace(caption, remark=None)
        wrong = _insert(caption, place, Mention(ghost, draw_word(rng, ghost), 1))
        return caption, replace(wrong, mentions=tuple(m for m in wrong.mentions if m.name not in dropped)), "merge"
    wrong = caption
    for ghost in ghosts[: 1 if rng.random() < 0.5 else 2]:
        kept = (*ghosts, *(ANCHOR.get(other) for other in ghosts))
        victims = [name for name in scene.names if name not in kept and name in {m.name for m in wrong.mentions}]
        strangers = [name for name in victims if ANCHOR.get(name, name) not in scene.names]
        if not victims:
            break
        choice = strangers if strangers and rng.random() < 0.7 else victims
        victim = choice[rng.integers(len(choice))]
        old = next(m for m in caption.mentions if m.name == victim)
        new = Mention(ghost, draw_word(rng, ghost), old.count)
        length = len(new.word.split())
        if length != len(old.word.split()):  # equal numbers of words: every object has a name of one word
            new, length = replace(new, word=draw_word(rng, ghost, 1)), 1
        spelt = replace(old, word=old.word if len(old.word.split()) == length else draw_word(rng, victim, 1))
        caption, wrong = caption.exchange(victim, spelt), wrong.exchange(victim, new)
        if victim in strangers:  # where habit would put the ghost
            caption, wrong = (_move(c, spoken, ANCHOR.get(ghost)) for c, spoken in ((caption, victim), (wrong, ghost)))
    if wrong == caption:  # every true object is the anchor of something that is missing
        ghost = _absent(scene, "")[0]
        victim = caption.mentions[-1]
        caption = caption.exchange(victim.name, replace(victim, word=draw_word(rng, victim.name, 1)))
        wrong = caption.exchange(victim.name, Mention(ghost, draw_word(rng, ghost, 1), victim.count))
    return caption, wrong, "swap"


def _absent(scene: Scene, context: str) -> list[str]:
    """Objects that the scene lacks, of one context where there are any."""
    absent = [name for name in NAMES if name not in scene.names]
    return [name for name in absent if CONTEXT_OF[name] == context] or absent


def _remarked(caption: Caption, name: str) -> bool:
    return caption.remark is not None and name in (caption.remark.subject, caption.remark.other)


def _insert(caption: Caption, place: int, mention: Mention) -> Caption:
    return replace(caption, mentions=(*caption.mentions[:place], mention, *caption.mentions[place:]))


def _move(caption: Caption, name: str, leader: str | None) -> Caption:
    """Puts the mention of ``name`` right after that of ``leader``."""
    moved = next(m for m in caption.mentions if m.name == name)
    rest = replace(caption, mentions=tuple(m for m in caption.mentions if m.name != name))
    place = next((i + 1 for i, m in enumerate(rest.mentions) if m.name == leader), 0)
    return _insert(rest, place, moved)


def draw_answer_pair(rng: np.random.Generator, scene: Scene) -> Pair:
    """A yes/no question, its true answer preferred: as often yes as no, most often about a pair's partner."""
    partners = [PARTNER[name] for name in scene.names if name in PARTNER]
    truth = rng.random() < 0.5
    likely = [name for name in partners if (name in scene.names) == truth]
    if not likely or rng.random() < 0.3:
        likely = list(scene.names) if truth else _absent(scene, "")
    asked = likely[rng.integers(len(likely))]
    answers = ("Yes", "No") if truth else ("No", "Yes")
    return Pair(question(asked), *answers, "co-occurrence", "answer")
