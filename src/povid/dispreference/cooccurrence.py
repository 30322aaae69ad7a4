"""A hallucinator without an endpoint: object statistics rewrite a correct answer by the paper's three causes.

1. *Co-occurrence*: an object that is absent but usual beside what is there takes the place of a named one of its kind
   (COCO's supercategories; in an enumeration that ends a sentence, of any), or joins.
2. *Relations and counts*: left becomes right, two become three, yes becomes no.
3. *Attributes*: a colour, size or state becomes another that captions give to such objects.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from povid.benchmarks.chair_words import read_synonyms
from povid.dispreference.causes import ATTRIBUTES, RELATIONS, Statistics, miscounts, opposites
from povid.dispreference.rows import Row
from povid.fault import Fault
from povid.preferences.differences import ATTRIBUTES as ATTRIBUTE_WORDS
from povid.preferences.differences import (
    COCO_OBJECTS,
    COLOURS,
    Mention,
    everyday_names,
    mentions,
    objects,
    plural,
    with_article,
    words,
)
from povid.preferences.records import mapping, parse_json, show
from povid.preferences.triple import Triple, Turn

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_HUES = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple", "grey")
_COATS = ("black", "white", "brown", "grey")  # of animals
_SCENERY = {"sky": ("blue", "grey", "orange"), "grass": ("green", "brown"), "field": ("green", "yellow", "brown")}
_BARE = {"broccoli": "some broccoli", "scissors": "a pair of scissors", "skis": "a pair of skis"}  # without a/an
_SIZES = (1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7)  # COCO's supercategories, in the order of its list
_ENDS = tuple(itertools.accumulate(_SIZES))
CLASS_OF = {name: bisect.bisect_right(_ENDS, number) for number, name in enumerate(COCO_OBJECTS)}
_OBJECTS = 0.7  # share of enumerations in which an object is wrong, as in the embedded world's own pairs
_SURE = 0.9  # what an enumeration takes in is at least so likely beside the others, as a share of the likeliest
_JOINS = (
    "There is also {a} in the scene.",
    "{A} can be seen nearby.",
    "In the background there is {a}.",
    "{A} is visible close by.",
)


def key_of(name: str) -> str:
    """A picture's key: COCO's number where the name ends in twelve digits, else the file's stem."""
    stem = Path(name).stem
    digits = re.search(r"(\d{12})$", stem)
    return str(int(digits.group(1))) if digits else stem


def read_objects(path: Path) -> dict[str, list[str]]:
    """Objects per picture (see :func:`key_of`) from COCO's instances JSON, or from ``{picture: [objects]}``.

    Raises:
        Fault: names the file and the entry at fault.
    """
    whole = mapping(parse_json(Path(path)), str(path), "the file")
    if "annotations" in whole and "categories" in whole:
        try:
            names = {entry["id"]: str(entry["name"]) for entry in whole["categories"]}
            files = {entry["id"]: key_of(str(entry["file_name"])) for entry in whole["images"]}
            found: dict[str, list[str]] = {key: [] for key in files.values()}
            for entry in whole["annotations"]:
                found[files[entry["image_id"]]].append(names[entry["category_id"]])
        except (KeyError, TypeError) as error:
            raise Fault(
                f"{path} is no COCO instances file ({type(error).__name__}: {show(error.args[:1])}); give "
                "instances_*.json or an objects.json"
            ) from None
        return found
    for name, listed in whole.items():
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise Fault(f"{path}: {show(name)} must be a list of object names, found {show(listed)}; mend it")
    return {key_of(name): listed for name, listed in whole.items()}


def learn(
    present: Mapping[str, Sequence[str]], captions: Iterable[str] = (), synonyms: Mapping[str, str] | None = None
) -> Statistics:
    """Count objects and pairs over pictures, and words and attributes over ``captions``.

    ``synonyms`` (word to object) are words for objects beside the everyday ones, which they overrule.
    """
    learned = Statistics({name: frozenset(listed) for name, listed in present.items()}, Counter(), defaultdict(Counter))
    for listed in learned.present.values():
        learned.pictures.update(sorted(listed))
        for one, other in itertools.permutations(sorted(listed), 2):
            learned.together[one][other] += 1
    learned.names = everyday_names() | {n: n for n in learned.pictures if n != "orange"} | dict(synonyms or {})
    for caption in captions:
        learned.said.update(words(caption))
        for mention in mentions(caption, learned.names):
            before = words(caption[: mention.start])[-1:]
            learned.looks[mention.name].update(word for word in before if word in ATTRIBUTE_WORDS)
    return learned


def hallucinate(row: Row, learned: Statistics, seed: int) -> str:
    """A wrong version of ``row.answer``: one to three edits, drawn by seed and record alone.

    An answer that enumerates gets one, mostly an object: a wrong number beside it would give the answer away.
    """
    rng = random.Random(f"{seed}:{row.id}:{row.question}")
    there = set(learned.present.get(picture_of(row.image, row.id), ())) | set(objects(row.answer, learned.names))
    said = row.answer
    if re.fullmatch(r"\W*[A-Za-z]\W*", said):  # an option's letter
        return said
    short = len(words(said)) <= 4
    edits = [_yes_no, _count, _attribute, _relation]
    rng.shuffle(edits)
    enumerates = bool(_closing_list(said, mentions(said, learned.names)))
    if rng.random() < _OBJECTS if enumerates else not short or not _small_change_possible(said):
        said = _swap_or_join(said, there, learned, rng, short)
    wanted = int(said == row.answer) if enumerates else 1 if short else rng.choice((1, 1, 2))
    for edit in edits:
        if wanted and (changed := edit(said, learned, rng)) != said:
            said, wanted = changed, wanted - 1
    if words(said) == words(row.answer):
        said = _swap_or_join(said, there, learned, rng, short)
    return said


def picture_of(image: Path | bytes, id: str) -> str:
    """The key under which a record's picture stands among the objects: its file's (:func:`key_of`), or ``id``."""
    return key_of(image.name) if isinstance(image, Path) else id


def _small_change_possible(said: str) -> bool:
    lower = words(said)
    return bool({"yes", "no"} & set(lower)) or any(w in _NUMBERS or w.isdigit() or w in ATTRIBUTE_WORDS for w in lower)


def _likely(there: set[str], learned: Statistics) -> list[tuple[str, float]]:
    """Absent objects that go with what is there; where none is known to, what is most usual anywhere."""
    if found := learned.companions(sorted(there)):
        return found
    usual = {name: count for name, count in learned.pictures.items() if name not in there}
    usual = usual or {name: 1 for name in COCO_OBJECTS if name not in there}
    total = sum(usual.values())
    odds = [(name, count / total) for name, count in usual.items()]
    return sorted(odds, key=lambda entry: (-entry[1], entry[0]))


def _swap_or_join(said: str, there: set[str], learned: Statistics, rng: random.Random, short: bool) -> str:
    named = mentions(said, learned.names)
    likely = _likely(there, learned)
    if not likely:
        return said
    listed = _closing_list(said, named)
    fitting = [
        mention
        for mention in named
        if (mention in listed or mention.name in CLASS_OF)
        and mention.name not in _BARE
        and (short or mention.name != "person")
    ]
    # in an enumeration as many join (longer) as stand for two (shorter), so that no length is learnt
    if fitting and (short or rng.random() < (0.85 if listed else 0.6)):
        sure = [(name, odds) for name, odds in likely if name not in _BARE and odds >= _SURE * likely[0][1]]
        if sure and (free := [mention for mention in listed if mention in fitting]):
            followed = [entry for entry in sure if _suggests(entry[0], listed, learned) != listed[-1]]
            new = _drawn(followed or sure, rng)
            suggests = _suggests(new, listed, learned)
            behind = listed[listed.index(suggests) + 1 :][:1]
            others = [mention for mention in free if mention != suggests] or free
            victim = behind[0] if behind and behind[0] in free else rng.choice(others)
            wrong = _replaced(said, victim, new, named)
            return _one_fewer(wrong, victim, learned, rng) if rng.random() < 0.15 / 0.85 else wrong
        victim = rng.choice(fitting)
        kind = CLASS_OF.get(victim.name)
        choice = [(name, odds) for name, odds in likely if CLASS_OF.get(name) == kind] or [
            (name, 1.0) for name in COCO_OBJECTS if name not in there and CLASS_OF[name] == kind
        ]
        if choice := [(name, odds) for name, odds in choice if name not in _BARE]:
            return _replaced(said, victim, _drawn(choice, rng), named)
    new = _drawn(likely[:6], rng)
    phrase = _BARE.get(new) or with_article(new)
    if listed:
        before = min(listed.index(_suggests(new, listed, learned)), len(listed) - 2)
        return f"{said[: listed[before].end]}, {phrase}{said[listed[before].end :]}"
    join = rng.choice(_JOINS)
    added = join.format(a=phrase, A=phrase[0].upper() + phrase[1:])
    return f"{said.rstrip()}{'' if said.rstrip()[-1:] in '.!?。！？' else '.'} {added}"


def _suggests(new: str, listed: Sequence[Mention], learned: Statistics) -> Mention:
    """The one beside which ``new`` is likeliest: habit would name it next."""
    return max(listed, key=lambda mention: learned.likelihood(new, mention.name))


def _one_fewer(said: str, kept: Mention, learned: Statistics, rng: random.Random) -> str:
    """An enumeration without one of its middle objects, if one is named nowhere else; never the one at ``kept``."""
    named = mentions(said, learned.names)
    listed = _closing_list(said, named)
    often = Counter(mention.name for mention in named)
    at = [n for n in range(1, len(listed) - 1) if often[listed[n].name] == 1 and listed[n].start != kept.start]
    if not at:
        return said
    dropped = rng.choice(at)
    return said[: listed[dropped - 1].end] + said[listed[dropped].end :]


def _closing_list(said: str, named: Sequence[Mention]) -> list[Mention]:
    """The objects of an enumeration that ends a sentence (a knife, two bowls and a spoon.), else none.

    There any object may stand in another's place, and one more may join, whatever the verb before it.
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


def _drawn(likely: Sequence[tuple[str, float]], rng: random.Random) -> str:
    return rng.choices([name for name, _ in likely], [odds + 1e-6 for _, odds in likely])[0]


def _replaced(said: str, victim: Mention, new: str, named: Sequence[Mention]) -> str:
    """``new`` wherever ``said`` uses the word of ``victim``, in either number."""

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
    """Where ``word`` stands; left and right where they are places ("He left", "that is right" are not)."""
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
    """One word or phrase becomes its opposite, rather one that the captions use."""
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
        for mention in _closing_list(said, mentions(said, learned.names))
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
    """What stands where ``no`` stood: an article, or ``some`` in the plural."""
    return "some" if match[1].lower().endswith("are") else with_article(match[2]).split()[0]


def rewrite(rows: Sequence[Row], learned: Statistics, seed: int) -> tuple[list[Triple], list[str], list[tuple]]:
    """Triples, their kinds of prompt, and (id, reasons) of rows from which no edit could be made."""
    triples, kinds, rejects = [], [], []
    for row in rows:
        wrong = hallucinate(row, learned, seed)
        if picture_of(row.image, row.id) not in learned.present:
            rejects.append((row.id, ["no objects of the picture"]))
        elif words(wrong) == words(row.answer):
            rejects.append((row.id, ["no edit fits"]))
        else:
            triples.append(row.triple(row.answer, wrong))
            kinds.append(row.kind)
    return triples, kinds, rejects


def instead(
    triples: Sequence[Triple],
    seed: int,
    *,
    objects: Path | None = None,
    synonyms: Path | None = None,
    limit: int | None = None,
    skipped: list[str] | None = None,
) -> list[Triple]:
    """The first ``limit`` triples with every dispreferred response made anew from the preferred one.

    Statistics are learned from all ``triples`` and pictures. Which objects a picture holds is read from ``objects``
    (:func:`read_objects`; pictures inside parquet files go by their record's id) or, where that does not know the
    picture, from the record's own list ``objects``. What the responses mention is no annotation: what they leave out
    may well be in the picture. In a conversation every response that can be changed is; ``synonyms`` is a file like
    CHAIR's synonyms.txt.

    Raises:
        Fault: there is no annotation, or (unless ``skipped`` takes the sentences) a record cannot be rewritten.
    """
    present: dict[str, list[str]] = defaultdict(list)
    for triple in triples:
        own = triple.meta.get("objects")
        if isinstance(own, list) and all(isinstance(name, str) for name in own):
            present[picture_of(triple.image, triple.id)] += own
    if objects is not None:
        present |= read_objects(objects)
    if not present:
        raise Fault(
            "dispreference=cooccurrence needs to know which objects are in the pictures, and these records "
            "do not say; give data.objects=FILE: COCO's instances JSON or {picture: [objects]}"
        )
    learned = learn(
        present,
        (turn.text for triple in triples for turn in triple.preferred if turn.role == "assistant"),
        read_synonyms(synonyms) if synonyms else None,
    )
    made, bad = [], []
    for triple in triples[:limit]:
        if picture_of(triple.image, triple.id) not in learned.present:
            bad.append(f"record {triple.id!r}: nothing says which objects are in its picture")
            continue
        turns = list(triple.preferred)
        for at in range(1, len(turns), 2):
            row = Row(triple.id, triple.image, turns[at - 1].text, turns[at].text, "captioning")
            turns[at] = Turn("assistant", hallucinate(row, learned, seed))
        if all(words(new.text) == words(old.text) for new, old in zip(turns, triple.preferred)):
            bad.append(f"record {triple.id!r}: no response of it can be changed")
        else:
            made.append(replace(triple, dispreferred=tuple(turns)))
    if skipped is not None:
        skipped += bad
    elif bad:
        raise Fault(
            f"dispreference=cooccurrence cannot rewrite {len(bad)} of {len(triples[:limit])} records (first: "
            f"{bad[0]}); complete data.objects, or set data.skip_bad=true to leave them out"
        )
    if not made:
        raise Fault("dispreference=cooccurrence could rewrite no record; see that data.objects is of these pictures")
    return made
