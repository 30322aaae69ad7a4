"""Writes hallucinations into free text by object statistics, without a model.

1. *Co-occurrence*: an object that is absent but usual beside what is there replaces a named one of its kind (COCO's
   supercategories; in an enumeration that ends a sentence, of any kind), or is added.
2. *Relations and counts*: left becomes right, two become three, yes becomes no.
3. *Attributes*: a colour, size or state becomes another that captions give to such objects.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from povid.dispreference.annotations import picture_of
from povid.dispreference.causes import (
    ATTRIBUTES,
    RELATIONS,
    Share,
    Shares,
    Statistics,
    draw,
    miscounts,
    opposites,
)
from povid.dispreference.rows import Row
from povid.preferences.differences import ATTRIBUTES as ATTRIBUTE_WORDS
from povid.preferences.differences import (
    COCO_OBJECTS,
    COLOURS,
    Mention,
    mentions,
    objects,
    plural,
    with_article,
    words,
)

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_HUES = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple", "grey")
_COATS = ("black", "white", "brown", "grey")  # of animals
_SCENERY = {"sky": ("blue", "grey", "orange"), "grass": ("green", "brown"), "field": ("green", "yellow", "brown")}
_BARE = {"broccoli": "some broccoli", "scissors": "a pair of scissors", "skis": "a pair of skis"}  # without a/an
_SIZES = (1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7)  # COCO's supercategories, in the order of its list
_ENDS = tuple(itertools.accumulate(_SIZES))
CLASS_OF = {name: bisect.bisect_right(_ENDS, number) for number, name in enumerate(COCO_OBJECTS)}
_ADDITIONS = (
    "There is also {a} in the scene.",
    "{A} can be seen nearby.",
    "In the background there is {a}.",
    "{A} is visible close by.",
)


class Rewriting(Shares):
    """How free text is rewritten.

    ``object_share`` and ``swap_share`` apply to enumerations, such as the embedded world's captions.

    Attributes:
        prose_swap_share: share of hallucinated objects outside enumerations that replace another; the others are added.
        likely_share: an enumeration takes only objects at least this likely, as a share of the likeliest one.
        further_edits: how many relations, counts and attributes outside enumerations become wrong as well; each number
            is drawn as often as it is listed.
    """

    prose_swap_share: Share = 0.6
    likely_share: Share = 0.9
    further_edits: Annotated[tuple[Annotated[int, Field(ge=0, le=4)], ...], Field(min_length=1)] = (1, 1, 2)


def hallucinate(row: Row, learned: Statistics, seed: int, settings: Rewriting | None = None) -> str:
    """A wrong version of ``row.answer``: one to three edits, drawn from seed and record alone.

    An answer that enumerates gets one, mostly an object: a wrong number as well would give the answer away. An answer
    to which no edit applies is returned unchanged.
    """
    settings = settings or Rewriting()
    rng = random.Random(f"{seed}:{row.id}:{row.question}")
    there = set(learned.present.get(picture_of(row.image, row.id), ())) | set(objects(row.answer, learned.names))
    said = row.answer
    if re.fullmatch(r"\W*[A-Za-z]\W*", said):  # the letter of an option
        return said
    short = len(words(said)) <= 4
    edits = [_yes_no, _count, _attribute, _relation]
    rng.shuffle(edits)
    enumerates = bool(_enumeration(said, mentions(said, learned.names)))
    if rng.random() < settings.object_share if enumerates else not short or not _small_change_possible(said):
        said = _swap_or_join(said, there, learned, rng, short, settings)
    wanted = int(said == row.answer) if enumerates else 1 if short else rng.choice(settings.further_edits)
    for edit in edits:
        if wanted and (changed := edit(said, learned, rng)) != said:
            said, wanted = changed, wanted - 1
    if words(said) == words(row.answer):
        said = _swap_or_join(said, there, learned, rng, short, settings)
    return said


def _small_change_possible(said: str) -> bool:
    lower = words(said)
    return bool({"yes", "no"} & set(lower)) or any(w in _NUMBERS or w.isdigit() or w in ATTRIBUTE_WORDS for w in lower)


def _swap_or_join(
    said: str, there: set[str], learned: Statistics, rng: random.Random, short: bool, settings: Rewriting
) -> str:
    """An absent object replaces a named one, or joins the others."""
    named = mentions(said, learned.names)
    likely = learned.likely(there)
    if not likely:
        return said
    listed = _enumeration(said, named)
    fitting = [
        mention
        for mention in named
        if (mention in listed or mention.name in CLASS_OF)
        and mention.name not in _BARE
        and (short or mention.name != "person")
    ]
    replacing = settings.swap_share + settings.longer if listed else settings.prose_swap_share  # one or two objects
    if fitting and (short or rng.random() < replacing):
        sure = [
            (name, odds) for name, odds in likely if name not in _BARE and odds >= settings.likely_share * likely[0][1]
        ]
        if sure and (free := [mention for mention in listed if mention in fitting]):
            followed = [entry for entry in sure if _leader(entry[0], listed, learned) != listed[-1]]
            new = draw(followed or sure, rng)
            leader = _leader(new, listed, learned)
            behind = listed[listed.index(leader) + 1 :][:1]
            others = [mention for mention in free if mention != leader] or free
            victim = behind[0] if behind and behind[0] in free else rng.choice(others)
            wrong = _replaced(said, victim, new, named)
            return _one_fewer(wrong, victim, learned, rng) if rng.random() < settings.longer / replacing else wrong
        victim = rng.choice(fitting)
        kind = CLASS_OF.get(victim.name)
        choice = [(name, odds) for name, odds in likely if CLASS_OF.get(name) == kind] or [
            (name, 1.0) for name in COCO_OBJECTS if name not in there and CLASS_OF[name] == kind
        ]
        if choice := [(name, odds) for name, odds in choice if name not in _BARE]:
            return _replaced(said, victim, draw(choice, rng), named)
    new = draw(likely[:6], rng)
    phrase = _BARE.get(new) or with_article(new)
    if listed:
        before = min(listed.index(_leader(new, listed, learned)), len(listed) - 2)
        return f"{said[: listed[before].end]}, {phrase}{said[listed[before].end :]}"
    join = rng.choice(_ADDITIONS)
    added = join.format(a=phrase, A=phrase[0].upper() + phrase[1:])
    return f"{said.rstrip()}{'' if said.rstrip()[-1:] in '.!?。！？' else '.'} {added}"


def _leader(new: str, listed: Sequence[Mention], learned: Statistics) -> Mention:
    """The listed object that suggests ``new`` most, after which habit would name it."""
    return listed[learned.leader(new, [mention.name for mention in listed]) or 0]


def _one_fewer(said: str, kept: Mention, learned: Statistics, rng: random.Random) -> str:
    """An enumeration without one of its middle objects that is named nowhere else; never without ``kept``."""
    named = mentions(said, learned.names)
    listed = _enumeration(said, named)
    often = Counter(mention.name for mention in named)
    at = [n for n in range(1, len(listed) - 1) if often[listed[n].name] == 1 and listed[n].start != kept.start]
    if not at:
        return said
    dropped = rng.choice(at)
    return said[: listed[dropped - 1].end] + said[listed[dropped].end :]


def _enumeration(said: str, named: Sequence[Mention]) -> list[Mention]:
    """The objects of an enumeration at the end of a sentence (a knife, two bowls and a spoon.), else none.

    In it any object can replace another and one more can join, whatever the verb before it.
    """
    for at in range(len(named) - 1, 0, -1):
        if not re.match(r"\s*([.!?]|$)", said[named[at].end :]):
            continue
        first = at
        while first and _BETWEEN.fullmatch(said[named[first - 1].end : named[first].start]):
            first -= 1
        if first < at and re.search(r"\band\b", said[named[at - 1].end : named[at].start]):
            return list(named[first : at + 1])
    return []


_BETWEEN = re.compile(
    rf"(?:,|,? and) (?:an?|the|some|{'|'.join(_NUMBERS)}) "
    rf"(?:(?:{'|'.join(sorted(ATTRIBUTE_WORDS))}) )*"
)


def _replaced(said: str, victim: Mention, new: str, named: Sequence[Mention]) -> str:
    """``new`` wherever ``said`` uses the word of ``victim``, singular or plural."""

    def spelt(mention: Mention) -> str:
        word = said[mention.start : mention.end].lower()
        return word if mention.plural else plural(word)

    same = [mention for mention in named if mention.name == victim.name and spelt(mention) == spelt(victim)]
    for mention in reversed(same):
        said = _put(said, mention.start, mention.end, plural(new) if mention.plural else new)
    return said


def _put(said: str, start: int, end: int, new: str) -> str:
    """``new`` in place of ``said[start:end]``, with its capital and the article that fits."""
    before = said[:start]
    new = new[0].upper() + new[1:] if said[start].isupper() else new
    if article := re.search(r"\b([Aa])n? $", before):
        right = with_article(new).partition(" ")[0]
        before = before[: article.start()] + (right if article.group(1) == "a" else right.capitalize()) + " "
    return before + new + said[end:]


def _found(said: str, word: str) -> list[re.Match[str]]:
    """Where ``word`` occurs; left and right only as places, not in "He left" or "that is right"."""
    found = re.finditer(rf"\b{re.escape(word)}\b", said, re.IGNORECASE)
    if word not in ("left", "right"):
        return list(found)
    return [
        match
        for match in found
        if {"the", "on", "to", "far", "upper", "lower", "top", "bottom"} & set(words(said[: match.start()])[-1:])
        or {"of", "side", "hand", "corner", "half", "edge", "part"} & set(words(said[match.end() :])[:1])
    ]


def _word_swapped(said: str, old: str, new: str, rng: random.Random) -> str:
    found = _found(said, old)
    if not found:
        return said
    match = rng.choice(found)
    return _put(said, match.start(), match.end(), new)


def _exchanged(said: str, pairs: Iterable[tuple[str, str]], learned: Statistics, rng: random.Random) -> str:
    """One word or phrase becomes its opposite, preferably one that the captions use."""
    words_of = dict.fromkeys(word for pair in pairs for word in pair)
    fitting = [word for word in words_of if _found(said, word)]
    if not fitting:
        return said
    old = rng.choice(fitting)
    return _word_swapped(said, old, rng.choice(opposites(old, pairs, learned.said)), rng)


def _relation(said: str, learned: Statistics, rng: random.Random) -> str:
    return _exchanged(said, RELATIONS, learned, rng)


def _count(said: str, learned: Statistics, rng: random.Random) -> str:
    spelt = [word for word in words(said) if word in _NUMBERS[1:]]
    digits = [word for word in words(said) if word.isdigit() and len(word) < 3]
    if spelt:
        old = rng.choice(spelt)
        near = [_NUMBERS[number - 1] for number in miscounts(_NUMBERS.index(old) + 1) if number <= len(_NUMBERS)]
        return _word_swapped(said, old, rng.choice([word for word in near if word in learned.said] or near), rng)
    if digits:
        old = rng.choice(digits)
        return _word_swapped(said, old, str(int(old) + rng.choice((1, 2))), rng)
    single = [
        mention
        for mention in _enumeration(said, mentions(said, learned.names))
        if not mention.plural and mention.name not in _BARE and re.search(r"(?<!\bis )\ban? $", said[: mention.start])
    ]
    if single:
        one = rng.choice(single)
        before = re.sub(r"\ban? $", f"{_NUMBERS[miscounts(1)[0] - 1]} ", said[: one.start])
        return before + plural(said[one.start : one.end]) + said[one.end :]
    return said


def _attribute(said: str, learned: Statistics, rng: random.Random) -> str:
    for mention in rng.sample(found := mentions(said, learned.names), len(found)):
        before = words(said[: mention.start])[-1:]
        if before and before[0] in COLOURS:
            usual = [look for look, _ in learned.looks[mention.name].most_common() if look in _HUES]
            coats = _COATS if CLASS_OF.get(mention.name) == CLASS_OF["dog"] else _HUES
            choice = [hue for hue in usual or coats if hue != before[0]] or [hue for hue in coats if hue != before[0]]
            return _word_swapped(said, before[0], rng.choice(choice), rng)
    hues = [match for match in re.finditer(r"\b\w+\b", said) if match.group().lower() in _HUES]
    if hues:
        old = rng.choice(hues)
        follows = (words(said[old.end() :]) or [""])[0]
        choice = [hue for hue in _SCENERY.get(follows, _HUES) if hue != old.group().lower()]
        return _put(said, old.start(), old.end(), rng.choice(choice))
    return _exchanged(said, ATTRIBUTES, learned, rng)


def _yes_no(said: str, learned: Statistics, rng: random.Random) -> str:
    start = re.match(r"(yes|no)\b", said, re.IGNORECASE)
    if not start:
        return said
    denies = start.group().lower() == "yes"
    other = "no" if denies else "yes"
    rest = said[start.end() :]
    there = r"\b(there (?:is|are)) " + ("(?:an?|some)" if denies else "no") + r" (?=(\w+))"
    rest = re.sub(
        there,
        lambda match: f"{match[1]} no " if denies else f"{match[1]} {_some(match)} ",
        rest,
        count=1,
        flags=re.IGNORECASE,
    )
    return (other.capitalize() if start.group()[0].isupper() else other) + rest


def _some(match: re.Match[str]) -> str:
    """What replaces ``no``: an article, or ``some`` for a plural."""
    return "some" if match[1].lower().endswith("are") else with_article(match[2]).split()[0]
