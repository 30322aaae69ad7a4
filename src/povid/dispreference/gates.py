"""Quality gates: why a reply is not a hallucinated version of its answer. Each reason is counted under its name."""

from __future__ import annotations

import re
import unicodedata
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from povid.dispreference.parse import Parsed, Unusable, parse
from povid.dispreference.rows import Row
from povid.preferences.differences import FUNCTION, changes, overlap, words

_REFUSAL = re.compile(
    r"^\W*(?:answer\s*:\s*)?(?:i(?:'|’)?m (?:very |so )?sorry|sorry\b|i apologi[sz]e|unfortunately, i|as an ai\b|"
    r"i (?:can(?:no|')?t|cannot|can’t|won't|will not|am (?:unable|not able)|(?:'|’)?m (?:unable|not able))\b|"
    r"i(?:'|’)m (?:unable|not able)\b|(?:it is|it's) not appropriate)",
    re.IGNORECASE,
)
# Words of the instruction that no answer about a picture needs.
_LEAKS = re.compile(
    r"hallucinat|question-answer pair|output format|requirements:|highly confusing|wrong caption|standard caption|"
    r"original (?:caption|answer)|generated (?:caption|answer)|modified (?:caption|answer)|answer [12]\b|your answer|"
    r"\bxxx\b|incorrect (?:caption|answer|response|version)|misleading (?:caption|answer|response)|"
    r"here(?:(?:'|’)s| is) (?:a|an|one|the)(?: \w+)? (?:response|answer|caption|version|description)",
    re.IGNORECASE,
)


class Gates(BaseModel):
    """Bounds that a pair must keep.

    Attributes:
        least_overlap, most_overlap: share of words in common and in order, 0 to 1.
        least_length, most_length: words of the dispreferred per word of the preferred.
        short: answers of at most this many words may change completely ("Two" for "Three"), so bounds do not apply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    least_overlap: float = Field(0.25, ge=0)
    most_overlap: float = Field(0.995, ge=0)
    least_length: float = Field(0.4, ge=0)
    most_length: float = Field(2.5, ge=0)
    short: int = Field(6, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for least, most in (("least_overlap", "most_overlap"), ("least_length", "most_length")):
            if getattr(self, least) >= getattr(self, most):
                raise ValueError(f"{least} must be smaller than {most}")
        return self


def judge(row: Row, reply: str, finish_reason: str, gates: Gates) -> Parsed:
    """The pair in a reply to the prompt for ``row``.

    Raises:
        Unusable: with one of the reasons empty, refusal, cut off, broken JSON, one answer of two, leaked instruction,
            wrong language, identical, changed everything, changed almost nothing, length, preferred strays, no
            hallucination.
    """
    if not reply.strip():
        raise Unusable("empty")
    if _REFUSAL.search(reply) and not _is_refusal(row.answer):
        raise Unusable("refusal")
    if finish_reason == "length":
        raise Unusable("cut off")
    if finish_reason == "content_filter":
        raise Unusable("refusal")
    found = parse(row.kind, reply)
    if _is_refusal(found.dispreferred) and not _is_refusal(row.answer):
        raise Unusable("refusal")
    for said in (found.dispreferred, found.preferred or ""):
        if _LEAKS.search(said) and not _LEAKS.search(row.answer):
            raise Unusable("leaked instruction")
    preferred = found.preferred or row.answer
    if foreign(row.answer, found.dispreferred) or foreign(row.answer, preferred):
        raise Unusable("wrong language")
    if has_reason(found.dispreferred) != has_reason(preferred):
        raise Unusable("one answer of two")  # the form alone would tell preferred from dispreferred
    if words(preferred) == words(found.dispreferred):
        raise Unusable("identical")
    _bounds(preferred, found.dispreferred, gates)
    if found.preferred is not None and not _faithful(row.answer, found.preferred):
        raise Unusable("preferred strays")
    if not _says_otherwise(preferred, found.dispreferred, gates):
        raise Unusable("no hallucination")
    return found


def _is_refusal(said: str) -> bool:
    return bool(_REFUSAL.search(said))


def _bounds(preferred: str, dispreferred: str, gates: Gates) -> None:
    first, second = len(words(preferred)), len(words(dispreferred))
    if not second:
        raise Unusable("empty")
    if first <= gates.short:
        if second > gates.most_length * max(gates.short, first):
            raise Unusable("length")
        return
    if not gates.least_length <= second / first <= gates.most_length:
        raise Unusable("length")
    shared = overlap(preferred, dispreferred)
    if shared < gates.least_overlap:
        raise Unusable("changed everything")
    if shared > gates.most_overlap:
        raise Unusable("changed almost nothing")


def has_reason(said: str) -> bool:
    """Whether an answer has Table 6's form Reason: ..., Result: ..."""
    return bool(re.match(r"\W*reason(?:ing)?\s*[:：]", said, re.IGNORECASE))


def _says_otherwise(preferred: str, dispreferred: str, gates: Gates) -> bool:
    """An object, count, attribute or relation changed, or two words did that no list knows (short answers: one)."""
    found = changes(preferred, dispreferred)
    unknown = [word for word in found.words if word not in FUNCTION]
    return bool(found.kinds) or len(unknown) >= (1 if len(words(preferred)) <= gates.short else 2)


def _faithful(answer: str, reorganised: str) -> bool:
    """The reorganised answer keeps at least 30 % of the original's content words (short answers: at least one)."""
    content = {word for word in words(answer) if word not in FUNCTION}
    return not content or len(content & set(words(reorganised))) >= max(1, 0.3 * len(content)) or len(content) <= 2


def foreign(expected: str, said: str) -> bool:
    """Whether ``said`` is in another script or, both being Latin, has too few English function words for English.

    The second test needs eight words on both sides. It only tells English from other languages.
    """
    here, there = _scripts(expected), _scripts(said)
    if there and sum(share for script, share in there.items() if script not in here) > 0.2:
        return True
    first, second = words(expected), words(said)
    if len(first) < 8 or len(second) < 8:
        return False
    return _english(first) >= 0.25 and _english(second) < 0.12


def _english(said: list[str]) -> float:
    return sum(word in _COMMON for word in said) / len(said)


# without those that are words of other European languages too (a, as, me, no, on, do ...)
_COMMON = frozenset(
    "the of and to is are was were with that this it its for from there which his her their by at be "
    "has have an in behind while".split()
)


def _scripts(said: str) -> dict[str, float]:
    letters = [unicodedata.name(char, "?").partition(" ")[0] for char in said if char.isalpha()]
    return {script: letters.count(script) / len(letters) for script in set(letters)} if letters else {}
