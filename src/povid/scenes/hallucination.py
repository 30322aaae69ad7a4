"""Writes hallucinations into true captions, by the paper's three causes (section 3.1).

*Co-occurrence*: a partner that habit expects and that is missing from the picture. In most pairs it replaces a true
object, so that both responses name equally many. The others are balanced between adding it (the dispreferred response
is longer) and replacing two true objects (it is shorter). So neither longer nor shorter captions are rewarded, and only
the picture tells the responses apart. *Relation*: left for right. *Attribute*: a wrong size or number.

What is plausible under each cause, and how often each occurs, comes from :mod:`povid.dispreference.causes`; the habits
come from the world's construction. The edits are specific to this world, because balanced lengths need a caption's
structure. The hallucinator for free text, which learns habits from lists of objects, is
``dispreference=cooccurrence``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from povid.dispreference.causes import ATTRIBUTES, RELATIONS, Cause, Share, Shares, Statistics, miscounts, opposites
from povid.scenes.language import Caption, Mention, draw_caption, draw_word, question
from povid.scenes.scene import BASE_PARTNER, Scene
from povid.scenes.vocabulary import ANCHOR, CONTEXT_OF, NAMES, PARTNER

# What the base model has learnt; tests find the same by counting objects in its scenes.
HABITS = Statistics(
    pictures=dict.fromkeys(ANCHOR.values(), 1.0),
    together={anchor: {partner: BASE_PARTNER} for anchor, partner in PARTNER.items()},
)
_SAID = ("left", "right", "small", "large")


class WorldShares(Shares):
    """How the world's captions are made wrong; where no object is hallucinated, half are relations and half attributes.

    Attributes:
        two_objects_share: share of replacing hallucinations that replace two objects by two others, where possible.
        stranger_share: share of replaced objects that have nothing to do with the scene's other objects, if there are
            any.
        any_object_share: share of yes/no questions about any object instead of a pair's partner.
    """

    two_objects_share: Share = 0.5
    stranger_share: Share = 0.7
    any_object_share: Share = 0.3


@dataclass(frozen=True, slots=True)
class Pair:
    """A preferred and a dispreferred response to ``prompt``; ``edit`` is swap, add, merge, flip, count or answer."""

    prompt: str
    preferred: str
    dispreferred: str
    cause: Cause
    edit: str


def draw_caption_pair(rng: np.random.Generator, scene: Scene, prompt: str, shares: WorldShares) -> Pair:
    """A complete true caption and one with a hallucination.

    With ``swap_share=1`` both captions have the same number of words, since relations and attributes never change it.
    """
    caption = draw_caption(rng, scene)
    chance = rng.random()
    relations = (1 - shares.object_share) / 2
    if chance < relations and caption.remark and caption.remark.other:
        wrong = _flipped(caption)
        return Pair(prompt, str(caption), str(wrong), "relation", "flip")
    if relations <= chance < 2 * relations:
        if caption.remark and not caption.remark.other:
            wrong = _flipped(caption)
            return Pair(prompt, str(caption), str(wrong), "attribute", "flip")
        remarked = (caption.remark.subject, caption.remark.other) if caption.remark else ()
        free = [mention for mention in caption.mentions if mention.name not in remarked]
        if free:
            counted = free[rng.integers(len(free))]
            wrong = caption.exchange(counted.name, replace(counted, count=miscounts(counted.count)[0]))
            return Pair(prompt, str(caption), str(wrong), "attribute", "count")
    caption, wrong, edit = _co_occurrence(rng, scene, caption, shares)
    return Pair(prompt, str(caption), str(wrong), "co-occurrence", edit)


def _flipped(caption: Caption) -> Caption:
    pairs = RELATIONS if caption.remark.other else ATTRIBUTES
    return replace(caption, remark=replace(caption.remark, value=opposites(caption.remark.value, pairs, _SAID)[0]))


def _co_occurrence(
    rng: np.random.Generator,
    scene: Scene,
    caption: Caption,
    shares: WorldShares,
) -> tuple[Caption, Caption, str]:
    expected = [name for name, _ in HABITS.companions(scene.names)]
    ghosts = rng.permutation(expected or _absent(scene, scene.context)).tolist()
    chance = rng.random()
    if chance >= shares.swap_share:
        ghost = ghosts[0]
        place = 1 + (HABITS.leader(ghost, [mention.name for mention in caption.mentions]) or 0)
        if chance < shares.swap_share + shares.longer:
            return caption, _insert(caption, place, Mention(ghost, draw_word(rng, ghost), 1)), "add"
        dropped = rng.permutation([name for name in scene.names if PARTNER.get(name) != ghost])[:2].tolist()
        if any(_remarked(caption, name) for name in dropped):
            caption = replace(caption, remark=None)
        wrong = _insert(caption, place, Mention(ghost, draw_word(rng, ghost), 1))
        return caption, replace(wrong, mentions=tuple(m for m in wrong.mentions if m.name not in dropped)), "merge"
    wrong = caption
    for ghost in ghosts[: 1 if rng.random() < 1 - shares.two_objects_share else 2]:
        kept = (*ghosts, *(ANCHOR.get(other) for other in ghosts))
        victims = [name for name in scene.names if name not in kept and name in {m.name for m in wrong.mentions}]
        strangers = [name for name in victims if ANCHOR.get(name, name) not in scene.names]
        if not victims:
            break
        choice = strangers if strangers and rng.random() < shares.stranger_share else victims
        victim = choice[rng.integers(len(choice))]
        old = next(m for m in caption.mentions if m.name == victim)
        new = Mention(ghost, draw_word(rng, ghost), old.count)
        length = len(new.word.split())
        if length != len(old.word.split()):  # equal numbers of words: every object has a name of one word
            new, length = replace(new, word=draw_word(rng, ghost, 1)), 1
        spelt = replace(old, word=old.word if len(old.word.split()) == length else draw_word(rng, victim, 1))
        caption, wrong = caption.exchange(victim, spelt), wrong.exchange(victim, new)
        if victim in strangers:  # where habit would put the ghost
            caption, wrong = (_move(c, name, ghost) for c, name in ((caption, victim), (wrong, ghost)))
    if wrong == caption:  # every true object is the anchor of something that is missing
        ghost = _absent(scene, "")[0]
        last = caption.mentions[-1]
        caption = caption.exchange(last.name, replace(last, word=draw_word(rng, last.name, 1)))
        wrong = caption.exchange(last.name, Mention(ghost, draw_word(rng, ghost, 1), last.count))
    return caption, wrong, "swap"


def _absent(scene: Scene, context: str) -> list[str]:
    """Objects that are missing from the scene, of ``context`` if there are any."""
    absent = [name for name in NAMES if name not in scene.names]
    return [name for name in absent if CONTEXT_OF[name] == context] or absent


def _remarked(caption: Caption, name: str) -> bool:
    return caption.remark is not None and name in (caption.remark.subject, caption.remark.other)


def _insert(caption: Caption, place: int, mention: Mention) -> Caption:
    return replace(caption, mentions=(*caption.mentions[:place], mention, *caption.mentions[place:]))


def _move(caption: Caption, name: str, ghost: str) -> Caption:
    """Put the mention of ``name`` where habit would put ``ghost``."""
    moved = next(m for m in caption.mentions if m.name == name)
    rest = replace(caption, mentions=tuple(m for m in caption.mentions if m.name != name))
    leader = HABITS.leader(ghost, [mention.name for mention in rest.mentions])
    return _insert(rest, 0 if leader is None else leader + 1, moved)


def draw_answer_pair(rng: np.random.Generator, scene: Scene, shares: WorldShares) -> Pair:
    """A yes/no question, its true answer preferred: as often yes as no, most often about a pair's partner."""
    partners = [PARTNER[name] for name in scene.names if name in PARTNER]
    truth = rng.random() < 0.5
    likely = [name for name in partners if (name in scene.names) == truth]
    if not likely or rng.random() < shares.any_object_share:
        likely = list(scene.names) if truth else _absent(scene, "")
    asked = likely[rng.integers(len(likely))]
    answers = ("Yes", "No") if truth else ("No", "Yes")
    return Pair(question(asked), *answers, "co-occurrence", "answer")
