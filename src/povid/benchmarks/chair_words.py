"""What CHAIR reads in a caption: its words, the double words that count as one, and the objects they stand for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import punkt
import textblob.en.inflect
from nltk.tokenize.punkt import PunktLanguageVars, PunktParameters, PunktSentenceTokenizer

from povid.fault import Fault

# What the official script hard-codes: two words that count as one, and what the pair then stands for.
DOUBLE_WORDS = {
    pair: pair
    for pair in (
        "motor bike",
        "motor cycle",
        "air plane",
        "traffic light",
        "street light",
        "traffic signal",
        "stop light",
        "fire hydrant",
        "stop sign",
        "parking meter",
        "suit case",
        "sports ball",
        "baseball bat",
        "baseball glove",
        "tennis racket",
        "wine glass",
        "hot dog",
        "cell phone",
        "mobile phone",
        "teddy bear",
        "hair drier",
        "potted plant",
        "laptop computer",
        "home plate",
        "train track",
    )
}
DOUBLE_WORDS |= {
    f"{age} {animal}": animal
    for age in ("baby", "adult")
    for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
}
DOUBLE_WORDS |= {"passenger jet": "jet", "passenger train": "train"}
DOUBLE_WORDS |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def read_synonyms(file: Path) -> dict[str, str]:
    """Word → node word (the first of its line), one class per line, split at comma and one space as officially.

    Spaces and capitals inside a line are kept, so that " motor bike" and "iPhone" of the official list never match.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Fault(
            f"{file} cannot be read ({error.strerror}); put CHAIR's data/synonyms.txt there "
            f"or run `python -m povid.benchmarks fetch chair --data {file.parent}`"
        ) from None
    classes = [line.strip().split(", ") for line in lines if line.strip()]
    return {word: words[0] for words in classes for word in words}


class _Punctuation(PunktLanguageVars):
    """How NLTK up to 3.9.2 ends a sentence; later versions let it also end at curly quotes and guillemets."""

    re_boundary_realignment = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
    _re_non_word_chars = r"(?:[)\";}\]\*:@\'\({\[?!])"


@functools.cache
def _sentences() -> PunktSentenceTokenizer:
    """NLTK's sentence splitter with its English model, which the package `punkt` contains and NLTK would download."""
    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update({word: int(flags) for word, flags in model.ortho_context.items()})
    return PunktSentenceTokenizer(parameters, lang_vars=_Punctuation())


# The rules of NLTKWordTokenizer in NLTK 3.3 to 3.9.2 (nltk/tokenize/destructive.py, Apache-2.0), one after the other.
# The official script reads captions with them; later versions also split at dashes and at other single quotes.
_WORD_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # opening quotes
        (r"([«“‘„]|[`]+)", r" \1 "),
        (r"^\"", r"``"),
        (r"(``)", r" \1 "),
        (r"([ \(\[{<])(\"|\'{2})", r"\1 `` "),
        (r"(?i)(\')(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"\1 \2"),
        # punctuation
        (r"([^\.])(\.)([\]\)}>\"\'»”’ ]*)\s*$", r"\1 \2 \3 "),
        (r"([:,])([^\d])", r" \1 \2"),
        (r"([:,])$", r" \1 "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&]", r" \g<0> "),
        (r"([^\.])(\.)([\]\)}>\"\']*)\s*$", r"\1 \2\3 "),
        (r"[?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[*]", r" \g<0> "),
        (r"[\]\[\(\)\{\}\<\>]", r" \g<0> "),
        (r"--", r" -- "),
        (r"^|\Z", r" "),
        # closing quotes
        (r"([»”’])", r" \1 "),
        (r"''", r" '' "),
        (r"\"", r" '' "),
        (r"\s+", r" "),
        (r"([^' ])('[sS]|'[mM]|'[dD]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
        # contractions
        (r"(?i)\b(can)(not)\b", r" \1 \2 "),
        (r"(?i)\b(d)('ye)\b", r" \1 \2 "),
        (r"(?i)\b(gim)(me)\b", r" \1 \2 "),
        (r"(?i)\b(gon)(na)\b", r" \1 \2 "),
        (r"(?i)\b(got)(ta)\b", r" \1 \2 "),
        (r"(?i)\b(lem)(me)\b", r" \1 \2 "),
        (r"(?i)\b(more)('n)\b", r" \1 \2 "),
        (r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 "),
        (r"(?i) ('t)(is)\b", r" \1 \2 "),
        (r"(?i) ('t)(was)\b", r" \1 \2 "),
    )
]


def tokens(caption: str) -> list[str]:
    """The words of a caption, in lower case."""
    return word_tokenize(caption.lower())


def word_tokenize(text: str) -> list[str]:
    """What ``nltk.word_tokenize(text)`` of NLTK 3.3 to 3.9.2 gives: sentences first, then the words of each.

    The rules are pinned here and above, since NLTK's own changed in 3.9.3 and 3.10.1.
    """
    words = []
    for sentence in _sentences().tokenize(text):
        for pattern, replacement in _WORD_RULES:
            sentence = pattern.sub(replacement, sentence)
        words += sentence.split()
    return words


@functools.lru_cache(maxsize=1 << 16)
def official_singular(word: str) -> str:
    """pattern's ``singularize``: textblob's, except for plurals of CHAIR's words where the two differ.

    Wrong singulars are part of it: bus → bu, glass → glas, ties → ty, collies → collies.
    """
    if word.endswith(("collies", "doggies")):
        return word
    if word.endswith("buses"):  # textblob makes "bus" of "airbuses" and "mini-buses" too
        return word[:-2]
    return textblob.en.inflect.singularize(word)


def mended_singular(known: Collection[str]) -> Callable[[str], str]:
    """A singular that keeps known words and corrects plurals that would miss one: bus → bus, ties → tie."""
    parts = {part for word in [*known, *DOUBLE_WORDS] for part in word.split()}

    @functools.lru_cache(maxsize=1 << 16)
    def singular(word: str) -> str:
        if word in parts:
            return word
        official = official_singular(word)
        return word[:-1] if official not in parts and word.endswith("s") and word[:-1] in parts else official

    return singular


def objects(caption: str, synonyms: Mapping[str, str], singular: Callable[[str], str] = official_singular) -> list[str]:
    """Node words of the objects that a caption mentions, in order, repeats kept (``caption_to_words``)."""
    words, merged, i = [singular(word) for word in tokens(caption)], [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        merged.append(DOUBLE_WORDS.get(pair, words[i]))
        i += 2 if pair in DOUBLE_WORDS else 1
    if "toilet" in merged:  # "the seat of the toilet" is no chair
        merged = [word for word in merged if word != "seat"]
    return [synonyms[word] for word in merged if word in synonyms]
