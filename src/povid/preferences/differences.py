"""How a dispreferred response differs from its preferred one: words, objects, and the kinds of hallucination.

The kinds follow the paper's causes (section 3.1): objects, counts, attributes, relations. They are read off the words
that changed, without a parser: good enough for statistics and gates, but no verdict on a single record.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

COCO_OBJECTS = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
# Everyday words for COCO's objects, and other things that pictures hold. An ambiguous word (orange) stays out.
OBJECT_WORDS = {
    "man": "person",
    "woman": "person",
    "men": "person",
    "women": "person",
    "people": "person",
    "boy": "person",
    "girl": "person",
    "child": "person",
    "children": "person",
    "kid": "person",
    "lady": "person",
    "guy": "person",
    "player": "person",
    "cyclist": "person",
    "surfer": "person",
    "rider": "person",
    "pedestrian": "person",
    "driver": "person",
    "skier": "person",
    "bike": "bicycle",
    "hatchback": "car",
    "van": "car",
    "taxi": "car",
    "motorbike": "motorcycle",
    "scooter": "motorcycle",
    "plane": "airplane",
    "jet": "airplane",
    "lorry": "truck",
    "ship": "boat",
    "sailboat": "boat",
    "canoe": "boat",
    "kitten": "cat",
    "puppy": "dog",
    "pony": "horse",
    "lamb": "sheep",
    "calf": "cow",
    "cattle": "cow",
    "purse": "handbag",
    "bag": "handbag",
    "luggage": "suitcase",
    "ball": "sports ball",
    "racket": "tennis racket",
    "racquet": "tennis racket",
    "mug": "cup",
    "glass": "wine glass",
    "glasses": "wine glass",
    "doughnut": "donut",
    "sofa": "couch",
    "plant": "potted plant",
    "table": "dining table",
    "television": "tv",
    "monitor": "tv",
    "phone": "cell phone",
    "cellphone": "cell phone",
    "smartphone": "cell phone",
    "fridge": "refrigerator",
    "stove": "oven",
    "teddy": "teddy bear",
    "knives": "knife",
    "sheep": "sheep",
    "skis": "skis",
    "ski": "skis",
    "scissors": "scissors",
    "bus": "bus",
    "buses": "bus",
    "glove": "baseball glove",
    "hydrant": "fire hydrant",
    "couches": "couch",
    "benches": "bench",
    "sandwiches": "sandwich",
    "toothbrushes": "toothbrush",
    "mice": "mouse",
} | {
    word: word
    for word in (
        "hat",
        "cap",
        "helmet",
        "sunglasses",
        "shirt",
        "jacket",
        "coat",
        "dress",
        "shoe",
        "scarf",
        "camera",
        "lamp",
        "window",
        "door",
        "fence",
        "tree",
        "flower",
        "bush",
        "rock",
        "mountain",
        "building",
        "house",
        "bridge",
        "tower",
        "sign",
        "flag",
        "balloon",
        "basket",
        "box",
        "plate",
        "napkin",
        "candle",
        "pan",
        "pot",
        "tray",
        "pillow",
        "blanket",
        "curtain",
        "rug",
        "mirror",
        "picture",
        "painting",
        "poster",
        "shelf",
        "cabinet",
        "drawer",
        "desk",
        "towel",
        "guitar",
        "fishing pole",
        "net",
        "rope",
        "ladder",
        "wheel",
        "cart",
        "wagon",
        "trailer",
        "tent",
        "swing",
        "slide",
        "fountain",
        "statue",
        "pole",
        "street lamp",
        "trash can",
        "bin",
        "newspaper",
        "magazine",
        "pen",
        "notebook",
        "tomato",
        "lemon",
        "egg",
        "bread",
        "cheese",
        "salad",
        "soup",
        "rice",
        "meat",
        "steak",
        "fish",
        "chicken",
        "butterfly",
        "squirrel",
        "rabbit",
        "goat",
        "pig",
        "monkey",
        "lion",
        "tiger",
        "crown",
        "necklace",
        "ring",
        "watch",
        "glove",
        "belt",
        "sock",
    )
}
COLOURS = frozenset(
    "black white grey gray silver red orange yellow green blue purple pink brown beige golden gold tan "
    "maroon turquoise violet cream dark light bright pale colourful colorful".split()
)
ATTRIBUTES = COLOURS | frozenset(
    "big small large little tiny huge giant tall short long wide narrow thick thin round square old young new modern "
    "vintage wooden metal plastic glass leather brick stone concrete striped spotted checkered plain empty full open "
    "closed wet dry clean dirty shiny rusty broken fresh ripe sliced cooked raw sunny cloudy rainy snowy foggy happy "
    "sad smiling angry bare crowded busy quiet calm fluffy furry smooth rough soft hard bald blond blonde curly "
    "straight folded electric ornate simple fancy casual formal".split()
)
NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve dozen several many few couple "
    "pair both single multiple another numerous".split()
)
RELATIONS = frozenset(
    "left right above below under underneath over on onto in inside outside into behind beside between near next front "
    "back top bottom middle centre center around across along against through past towards toward away far close "
    "opposite beyond among atop facing foreground background corner side holding holds held carrying carries wearing "
    "wears riding rides sitting sits seated standing stands lying lies leaning leans walking walks running runs eating "
    "eats drinking looking looks watching watches pushing pulling throwing catching kicking hitting playing feeding "
    "chasing parked flying flies hanging hangs attached crossing because therefore since so cause causes caused result "
    "leads led indicates suggests".split()
)
ARTICLES = frozenset("a an the this that these those some any no its his her their".split())
FUNCTION = ARTICLES | frozenset(
    "and or but of to with for from by at as is are was were be been being it he she they there here which who whom "
    "whose what when where while than then also too very more most not can could may might will would should do does "
    "did has have had having if such up down out off about appears appear seems seem seen visible image picture photo "
    "scene shows showing shown one's each other all yes reason answer".split()
)

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|\s+|[^\w\s]|_")
MOST_PAIRS = 1_000_000  # pairs of equal words that comparing two texts looks at
_LONGEST = max(len(word.split()) for word in (*COCO_OBJECTS, *OBJECT_WORDS))


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def overlap(first: str, second: str) -> float:
    """Share of words in common and in order, 0 to 1 (difflib's ratio over words); see :func:`compared_whole`."""
    left, right = words(first), words(second)
    same = sum(b - a for kind, a, b, _, _ in _opcodes(left, right) if kind == "equal")
    return 2 * same / (len(left) + len(right)) if left or right else 1.0


def compared_whole(first: str, second: str) -> bool:
    """Whether all words of two texts are compared.

    Comparing takes time by the number of pairs of equal words, so that a text of 16,000 asterisks would take half a
    minute. Beyond :data:`MOST_PAIRS` (no pair of real captions comes near) only what two texts share at their beginning
    and at their end counts as the same.
    """
    return _pairs(_tokens(first), _tokens(second)) <= MOST_PAIRS


def _pairs(left: Sequence[str], right: Sequence[str]) -> int:
    counts = Counter(left)
    return sum(counts[word] for word in right)


def _tokens(text: str) -> list[str]:
    return [token.lower() for token in _TOKEN.findall(text)]


def _opcodes(left: Sequence[str], right: Sequence[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """difflib's opcodes, or those of both ends alone (see :func:`compared_whole`)."""
    if _pairs(left, right) <= MOST_PAIRS:
        return difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    most = min(len(left), len(right))
    start = next((at for at in range(most) if left[at] != right[at]), most)
    end = next((at for at in range(most - start) if left[-1 - at] != right[-1 - at]), most - start)
    a, b = len(left) - end, len(right) - end
    codes = [("equal", 0, start, 0, start), ("replace", start, a, start, b), ("equal", a, len(left), b, len(right))]
    return [code for code in codes if code[2] > code[1] or code[4] > code[3]]


def segments(first: str, second: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (piece of first, piece of second, same), which join to both texts; words are never cut."""
    left, right = _TOKEN.findall(first), _TOKEN.findall(second)
    good = bad = ""
    for kind, a, b, c, d in _opcodes([t.lower() for t in left], [t.lower() for t in right]):
        first, second = "".join(left[a:b]), "".join(right[c:d])
        if kind != "equal" or ((good or bad) and not first.strip() and b < len(left)):
            good, bad = good + first, bad + second
        else:
            if good or bad:
                yield good, bad, False
                good = bad = ""
            yield first, second, True
    if good or bad:
        yield good, bad, False


@functools.cache
def _names() -> dict[str, str]:
    return everyday_names()


def everyday_names() -> dict[str, str]:
    """Words for objects (COCO's names, everyday words for them, other things) to the object's name."""
    return {name: name for name in COCO_OBJECTS if name != "orange"} | OBJECT_WORDS


def _singular(word: str, known: Mapping[str, str] | None = None) -> str:
    known = _names() if known is None else known
    if word not in known and word in _SINGULARS:
        return _SINGULARS[word]
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and word[: -len(ending)] + instead in known:
            return word[: -len(ending)] + instead
    return word


_IRREGULAR = {
    "person": "people",
    "knife": "knives",
    "mouse": "mice",
    "calf": "calves",
    "man": "men",
    "woman": "women",
    "child": "children",
    "teddy": "teddys",  # as the embedded world's model has learnt it
    **{word: word for word in ("sheep", "skis", "scissors", "broccoli")},
}
_SINGULARS = {plural: word for word, plural in _IRREGULAR.items() if plural != word}


def plural(name: str) -> str:
    """Plural of an object's name."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "ch", "sh", "x")) else "s")


def with_article(words: str) -> str:
    """``a`` or ``an`` in front of ``words``."""
    return ("an " if words[0].lower() in "aeiou" else "a ") + words


@dataclass(frozen=True, slots=True)
class Mention:
    """An object named at ``text[start:end]``; ``name`` is COCO's where it has one."""

    start: int
    end: int
    name: str
    plural: bool


def mentions(text: str, names: Mapping[str, str] | None = None) -> list[Mention]:
    """Objects named in a text, in order; the longest name wins, plurals count as their singular.

    ``names`` (word to object, words of at most three parts) replaces COCO's and the everyday words.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    said, known, found, at = words(text), _names() if names is None else names, [], 0
    while at < len(said):
        for length in range(min(_LONGEST, len(said) - at), 0, -1):
            last = said[at + length - 1]
            singular = _singular(last, known)
            name = known.get(" ".join([*said[at : at + length - 1], singular]))
            if name is not None:
                plural = singular != last or last in _PLURALS
                found.append(Mention(spans[at][0], spans[at + length - 1][1], name, plural))
                at += length
                break
        else:
            at += 1
    return found


_PLURALS = frozenset("men women people children knives mice glasses cattle skis scissors couches benches buses".split())


def objects(text: str, names: Mapping[str, str] | None = None) -> list[str]:
    """Names of the objects in a text, in order, repeats included; ``names`` as for :func:`mentions`."""
    return [mention.name for mention in mentions(text, names)]


@dataclass(frozen=True, slots=True)
class Changes:
    """What a dispreferred response brought in.

    ``kinds`` holds those of object, count, attribute and relation of which a word changed; ``objects`` names the
    objects that the preferred response does not name; ``words`` are the new words.
    """

    kinds: frozenset[str]
    objects: tuple[str, ...]
    words: tuple[str, ...]


def changes(preferred: str, dispreferred: str) -> Changes:
    """Read the kinds of hallucination off the words that differ (replacement and removal count as well)."""
    left, right = words(preferred), words(dispreferred)
    others = _other_numbers(left)
    new: list[str] = []
    touched: list[str] = []
    kinds = set()
    for kind, a, b, c, d in _opcodes(left, right):
        if kind == "equal":
            continue
        new += right[c:d]
        touched += left[a:b] + right[c:d]
        for at in range(c, d):
            if _is_thing(right, at) and right[at] not in others:
                kinds.add("object")
    named = set(objects(preferred))
    added = tuple(dict.fromkeys(name for name in objects(dispreferred) if name not in named))
    gone = set(objects(preferred)) - set(objects(dispreferred))
    if added or gone:
        kinds.add("object")
    if any(word in NUMBERS or word.isdigit() for word in touched) or _plural_changed(left, right):
        kinds.add("count")
    if any(word in ATTRIBUTES for word in touched):
        kinds.add("attribute")
    if any(word in RELATIONS for word in touched) or {"yes", "no", "not"} & set(touched):
        kinds.add("relation")
    return Changes(frozenset(kinds), added, tuple(new))


def _is_thing(said: list[str], at: int) -> bool:
    """A new word that no list knows and that an article, number or attribute introduces is taken for an object."""
    if said[at] in NUMBERS | ATTRIBUTES | RELATIONS | FUNCTION or _singular(said[at]) in _names():
        return False
    return at > 0 and said[at - 1] in ARTICLES | NUMBERS | ATTRIBUTES


def _other_numbers(said: list[str]) -> set[str]:
    """Each word with and without a final s: a unicorn, two unicorns are no new object."""
    return {word + "s" for word in said} | {word.removesuffix("s") for word in said}


def _plural_changed(left: list[str], right: list[str]) -> bool:
    """Some object is named in one number on one side only: a bicycle, two bicycles."""
    one, two = set(left) - set(right), set(right) - set(left)
    return bool(_other_numbers(list(one)) & two) or bool({_singular(w) for w in one} & {_singular(w) for w in two})
