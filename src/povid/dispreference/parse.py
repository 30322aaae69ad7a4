"""From the reply of a generator to the pair of answers in it. Table 6 leaves the form open, so this is tolerant."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from povid.dispreference.prompts import Kind


@dataclass(frozen=True, slots=True)
class Parsed:
    """``preferred`` is the reorganised correct answer (Answer 2), None where the original answer stands."""

    dispreferred: str
    preferred: str | None = None


class Unusable(Exception):
    """A reply that yields no pair; the message is the reason under which it is counted."""


LONGEST_REPLY = 50_000  # characters
# What may be repeated before a word is bounded, or a reply of asterisks would take time by the square of its length.
_ANSWER = re.compile(r"^[\s*#>_\"'`(-]{0,40}answer[\s*_]{0,20}[:：][\s*_]*", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(r"\bAnswer\s*:\s*")
_LABEL = re.compile(r"[*_#]{0,8}[(\[]?\s{0,8}\banswer\s*([12])\b\s*[)\]]?\s*[*_]*\s*[:：]?[*_]*", re.IGNORECASE)
_REASON = re.compile(r"\breason(?:ing)?\s*[:：]", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»"}


def parse(kind: Kind, reply: str) -> Parsed:
    """Read a reply to one of Table 6's prompts.

    Both prompts ask for ``Answer: ...``: what follows the last such line counts, or everything where there is none.
    For ``reasoning`` a reply may hold Answer 1 (corrupted) and Answer 2 (the original, reorganised), marked by labels
    before or after each, or by two ``Reason:`` in this order.

    Raises:
        Unusable: "empty", "too long", "broken JSON", or "one answer of two".
    """
    if len(reply) > LONGEST_REPLY:
        raise Unusable("too long")
    reply = _plain(reply)
    if kind == "reasoning":
        both = _labelled(reply) or _two_reasons(reply)
        if both is not None:
            first, second = map(_clean, both)
            if not first or not second:
                raise Unusable("empty")
            return Parsed(first, second)
        if len(set(_LABEL.findall(reply))) == 1 and not _LABEL.search(reply).group(1) == "1":
            raise Unusable("one answer of two")
    answer = _clean(_after_answer(reply, kind))
    if not answer:
        raise Unusable("empty")
    return Parsed(answer)


def _plain(reply: str) -> str:
    """The text of a reply, which some models wrap into a code fence or a JSON object."""
    reply = re.sub(r"^\s*```\w*\n|\n?```\s*$", "", reply.strip()).strip()
    if reply.startswith(("{", "[")):
        try:
            value = json.loads(reply)
        except (ValueError, RecursionError):
            raise Unusable("broken JSON") from None
        if isinstance(value, dict):
            named = {str(key).strip().lower(): said for key, said in value.items() if isinstance(said, str)}
            if "answer 1" in named and "answer 2" in named:
                return f"Answer 1: {named['answer 1']}\nAnswer 2: {named['answer 2']}"
            if "answer" in named:
                return f"Answer: {named['answer']}"
        raise Unusable("broken JSON")
    return reply


def _labelled(reply: str) -> tuple[str, str] | None:
    found = list(_LABEL.finditer(reply))
    if [match.group(1) for match in found] != ["1", "2"]:
        return None
    one, two = found
    before = _ANSWER.sub("", reply[: one.start()]).strip(" \n\"'*-:")
    # a label after its answer: Reason: ..., Result: ... (Answer 1)
    if _REASON.search(before):
        return reply[: one.start()], reply[one.end() : two.start()]
    return reply[one.end() : two.start()], reply[two.end() :]


def _two_reasons(reply: str) -> tuple[str, str] | None:
    found = [match.start() for match in _REASON.finditer(reply)]
    if len(found) != 2:
        return None
    return reply[found[0] : found[1]], reply[found[1] :]


def _after_answer(reply: str, kind: Kind) -> str:
    found = list(_ANSWER.finditer(reply)) or list(_INLINE.finditer(reply))
    # Figure 3 prints "Reasoning: ... Answer: ...", where the answer is only the end of what counts
    if kind == "reasoning" and (reason := _REASON.search(reply)) and found and reason.start() < found[-1].start():
        return reply[reason.start() :]
    return reply[found[-1].end() :] if found else reply


def _clean(said: str) -> str:
    said = _LABEL.sub("", said)
    said = re.sub(r"^[\s*#>_-]*answer[\s*_]*[:：]", "", said, flags=re.IGNORECASE)
    said = re.sub(r"[\s*#_]{0,40}\banswer\s{0,8}[:：]?$", "", said.rstrip(), flags=re.IGNORECASE).strip(" \n\t*_")
    while len(said) > 1 and _QUOTES.get(said[0]) == said[-1]:
        said = said[1:-1].strip()
    return re.sub(r"\*\*(.+?)\*\*", r"\1", said).strip()
