"""A hallucinator without an endpoint: object statistics rewrite a correct answer by the paper's three causes.

1. *Co-occurrence*: an object that is absent but usual beside what is there takes the place of a
   named one of its kind (COCO's supercategories), or joins.
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
from dataclasses import dataclass, field
from pathlib import Path

from povid.dispreference.rows import Row
from povid.fault import Fault
from povid.preferences.differences import (
    ATTRIBUTES,
    COCO_OBJECTS,
    COLOURS,
    Mention,
    mentions,
    objects,
    words,
)
from povid.preferences.records import mapping, parse_json, show
from povid.preferences.triple import Triple

_FLIPS = [("left", "right"), ("above", "below"), ("in front of", "behind"), ("on top of", "under"),
          ("inside", "outside"), ("next to", "far away from"), ("beside", "behind"), ("near", "far from"),
          ("foreground", "background"), ("standing", "sitting"), ("stands", "sits"), ("walking", "running"),
          ("open", "closed"), ("before", "after"), ("towards", "away from")]
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_SETS = [("big", "small"), ("large", "small"), ("tall", "short"), ("young", "old"), ("wooden", "metal"),
         ("empty", "full"), ("new", "old"), ("long", "short"), ("sunny", "cloudy"), ("clear", "cloudy"),
         ("clean", "dirty"), ("wet", "dry"), ("dark", "bright"), ("happy", "sad"), ("striped", "plain"),
         ("sandy", "rocky"), ("brick", "wooden")]
_HUES = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple", "grey")
_PLURALS = {"person": "people", "knife": "knives", "mouse": "mice", "sheep": "sheep", "skis": "skis",
            "scissors": "scissors", "broccoli": "broccoli"}
_SIZES = (1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7)  # COCO's supercategories, in the order of its list
_ENDS = tuple(itertools.accumulate(_SIZES))
CLASS_OF = {name: bisect.bisect_right(_ENDS, number) for number, name in enumerate(COCO_OBJECTS)}
_JOINS = ("There is also {a} in the scene.", "{A} can be seen nearby.", "In the background there is {a}.",
          "{A} is visible close by.")


@dataclass(slots=True)
class Statistics:
    """Which objects come together, how often each comes, and what captions call them.

    ``pictures[a]`` counts pictures with a; ``together[a][b]`` pictures with both; ``looks[a]`` attributes said of a.
    """

    present: dict[str, frozenset[str]] = field(default_factory=dict)
    pictures: Counter[str] = field(default_factory=Counter)
    together: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    looks: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def companions(self, there: Iterable[str], banned: Iterable[str]) -> list[tuple[str, float]]:
        """Absent objects with their likelihood beside what is ``there``: the largest P(absent | present one)."""
        there, banned = set(there), set(banned)
        odds: Counter[str] = Counter()
        for name in sorted(there):
            for other, count in self.together.get(name, {}).items():
                if other not in banned and other not in there:
                    odds[other] = max(odds[other], count / self.pictures[name])
        if not odds:  # nothing is known to come with these: what is most usual anywhere
            usual = self.pictures or Counter(COCO_OBJECTS)
            total = sum(usual.values())
            odds.update({name: count / total for name, count in usual.items() if name not in banned | there})
        return sorted(odds.items(), key=lambda entry: (-entry[1], entry[0]))


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
            raise Fault(f"{path} is no COCO instances file ({type(error).__name__}: {show(error.args[:1])}); give "
                        "instances_*.json or an objects.json") from None
        return found
    for name, listed in whole.items():
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise Fault(f"{path}: {show(name)} must be a list of object names, found {show(listed)}; mend it")
    return {key_of(name): listed for name, listed in whole.items()}


def learn(present: Mapping[str, Sequence[str]], captions: Iterable[str] = ()) -> Statistics:
    """Count objects and pairs over pictures, and attributes over ``captions``."""
    learned = Statistics({name: frozenset(listed) for name, listed in present.items()})
    for listed in learned.present.values():
        learned.pictures.update(sorted(listed))
        for one, other in itertools.permutations(sorted(listed), 2):
            learned.together[one][other] += 1
    for caption in captions:
        for mention in mentions(caption):
            before = words(caption[: mention.start])[-1:]
            learned.looks[mention.name].update(word for word in before if word in ATTRIBUTES)
    return learned


def hallucinate(row: Row, learned: Statistics, seed: int) -> str:
    """A wrong version of ``row.answer``: one to three edits, drawn by seed and record alone."""
    rng = random.Random(f"{seed}:{row.id}:{row.question}")
    name = key_of(row.image.name) if isinstance(row.image, Path) else row.id
    there = set(learned.present.get(name, ())) | set(objects(row.answer))
    said = row.answer
    short = len(words(said)) <= 4
    edits = [_yes_no, _count, _attribute, _relation]
    rng.shuffle(edits)
    if not short or not _small_change_possible(said):
        said = _swap_or_join(said, there, learned, rng, short)
    wanted = 1 if short else rng.choice((1, 1, 2))
    for edit in edits:
        if wanted and (changed := edit(said, learned, rng)) != said:
            said, wanted = changed, wanted - 1
    if words(said) == words(row.answer):
        said = _swap_or_join(said, there, learned, rng, short)
    return said


def _small_change_possible(said: str) -> bool:
    lower = words(said)
    return bool({"yes", "no"} & set(lower)) or any(w in _NUMBERS or w.isdigit() or w in ATTRIBUTES for w in lower)


def _swap_or_join(said: str, there: set[str], learned: Statistics, rng: random.Random, short: bool) -> str:
    named = mentions(said)
    likely = learned.companions(there, {mention.name for mention in named})
    if not likely:
        return said
    victims = [mention for mention in named if mention.name in CLASS_OF and (short or mention.name != "person")]
    if victims and (short or rng.random() < 0.6):
        victim = rng.choice(victims)
        of_its_kind = [(name, odds) for name, odds in likely if CLASS_OF.get(name) == CLASS_OF[victim.name]]
        of_its_kind = of_its_kind or [(name, 1.0) for name in COCO_OBJECTS if name not in there | {victim.name}
                                      and CLASS_OF[name] == CLASS_OF[victim.name]]
        if of_its_kind:
            return _replaced(said, victim, _drawn(of_its_kind, rng))
    new = _drawn(likely[:6], rng)
    join = rng.choice(_JOINS)
    with_article = f"{_article(new)} {new}"
    added = join.format(a=with_article, A=with_article[0].upper() + with_article[1:])
    return f"{said.rstrip()}{'' if said.rstrip()[-1:] in '.!?' else '.'} {added}"


def _drawn(likely: Sequence[tuple[str, float]], rng: random.Random) -> str:
    return rng.choices([name for name, _ in likely], [odds + 1e-6 for _, odds in likely])[0]


def _replaced(said: str, victim: Mention, new: str) -> str:
    word = _plural(new) if victim.plural else new
    before, after = said[: victim.start], said[victim.end :]
    if said[victim.start].isupper():
        word = word[0].upper() + word[1:]
    if article := re.search(r"\b([Aa])n?( )$", before):
        right = _article(word)
        before = before[: article.start()] + (right if article.group(1) == "a" else right.capitalize()) + " "
    return before + word + after


def _plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    return name + ("es" if name.endswith(("s", "ch", "sh", "x")) else "s")


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def _word_swapped(said: str, old: str, new: str, rng: random.Random) -> str:
    found = list(re.finditer(rf"\b{re.escape(old)}\b", said, re.IGNORECASE))
    if not found:
        return said
    match = rng.choice(found)
    new = new.capitalize() if match.group()[0].isupper() else new
    before = said[: match.start()]
    if article := re.search(r"\b([Aa])n? $", before):
        right = _article(new)
        before = before[: article.start()] + (right if article.group(1) == "a" else right.capitalize()) + " "
    return before + new + said[match.end() :]


def _relation(said: str, learned: Statistics, rng: random.Random) -> str:
    both = [pair for one, other in _FLIPS for pair in ((one, other), (other, one))]
    fitting = [pair for pair in both if re.search(rf"\b{pair[0]}\b", said, re.IGNORECASE)]
    return _word_swapped(said, *rng.choice(fitting), rng) if fitting else said


def _count(said: str, learned: Statistics, rng: random.Random) -> str:
    spelt = [word for word in words(said) if word in _NUMBERS[1:]]
    digits = [word for word in words(said) if word.isdigit() and len(word) < 3]
    if spelt:
        old = rng.choice(spelt)
        at = _NUMBERS.index(old)
        near = [n for n in (at - 1, at + 1) if 1 <= n < len(_NUMBERS)]
        return _word_swapped(said, old, _NUMBERS[rng.choice(near)], rng)
    if digits:
        old = rng.choice(digits)
        return _word_swapped(said, old, str(int(old) + rng.choice((1, 2))), rng)
    return said


def _attribute(said: str, learned: Statistics, rng: random.Random) -> str:
    for mention in rng.sample(found := mentions(said), len(found)):
        before = words(said[: mention.start])[-1:]
        if before and before[0] in COLOURS:
            usual = [look for look, _ in learned.looks[mention.name].most_common() if look in _HUES]
            choice = [hue for hue in usual or _HUES if hue != before[0]] or [hue for hue in _HUES if hue != before[0]]
            return _word_swapped(said, before[0], rng.choice(choice), rng)
    hues = [word for word in words(said) if word in _HUES]
    if hues:
        old = rng.choice(hues)
        return _word_swapped(said, old, rng.choice([hue for hue in _HUES if hue != old]), rng)
    both = [pair for one, other in _SETS for pair in ((one, other), (other, one))]
    fitting = [pair for pair in both if pair[0] in words(said)]
    return _word_swapped(said, *rng.choice(fitting), rng) if fitting else said


def _yes_no(said: str, learned: Statistics, rng: random.Random) -> str:
    start = re.match(r"(yes|no)\b", said, re.IGNORECASE)
    if not start:
        return said
    other = "no" if start.group().lower() == "yes" else "yes"
    return (other.capitalize() if start.group()[0].isupper() else other) + said[start.end() :]


def rewrite(rows: Sequence[Row], learned: Statistics, seed: int) -> tuple[list[Triple], list[str], list[tuple]]:
    """Triples, their kinds of prompt, and (id, reasons) of rows from which no edit could be made."""
    triples, kinds, rejects = [], [], []
    for row in rows:
        wrong = hallucinate(row, learned, seed)
        if words(wrong) == words(row.answer):
            rejects.append((row.id, ["no edit fits"]))
        else:
            triples.append(row.triple(row.answer, wrong))
            kinds.append(row.kind)
    return triples, kinds, rejects
