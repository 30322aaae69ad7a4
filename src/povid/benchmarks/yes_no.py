"""What a reader takes for a yes, a no or neither, and the figures of yes/no answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Verdict = Literal["yes", "no"]
FEW = 1.0  # percent of invalid answers that need no note

_WORD = re.compile(r"[a-z]+(?:['’]t)?")
_NEGATIONS = {"no", "not", "nope", "nah", "none", "nothing", "never", "neither", "nor", "cannot", "without"}
_YES = re.compile(r"\b(?:yes|yeah|yep|yup)\b|^there (?:is|are)\b|^there['’]s\b")
_UNDECIDED = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible)|unsure|unclear|(?:do not|don['’]t) know"
    r"|(?:cannot|can not|can['’]t|unable to) (?:tell|say|determine|answer|be sure))\b"
)


def first_sentence(answer: str) -> str:
    """The first sentence or line, in lower case."""
    return re.split(r"[.!?\n]", answer.strip())[0].lower()


def negates(words: Sequence[str]) -> bool:
    """Whether one of the words of a sentence (in lower case) is a negation."""
    return any(word in _NEGATIONS or word.endswith(("n't", "n’t")) for word in words)


def words_of(sentence: str) -> list[str]:
    """The words of a sentence in lower case; "isn't" is one word."""
    return _WORD.findall(sentence)


def verdict(answer: str) -> Verdict | None:
    """What the first sentence of an answer says; None, an invalid answer, where it says neither yes nor no.

    A leading yes or no decides. Otherwise a negation is a no, and yes, yeah, yep or a leading "There is" is a yes.
    Nothing of that, both of it, and a sentence such as "I cannot tell" are invalid.
    """
    sentence = first_sentence(answer)
    words = words_of(sentence)
    if words and words[0] in ("yes", "no"):
        return "yes" if words[0] == "yes" else "no"
    if _UNDECIDED.search(sentence):
        return None
    no, yes = negates(words), bool(_YES.search(sentence))
    if sentence.startswith("there") and no:  # "There is no dog"
        return "no"
    return None if no == yes else "yes" if yes else "no"


def f1_terms(said: str | None, label: str, positive: Verdict = "yes") -> list[int]:
    """Numerator and denominator that one answer adds to F1 = 2 tp / (2 tp + fp + fn); an invalid one adds nothing."""
    if said is None or positive not in (said, label):
        return [0, 0]
    return [2, 2] if said == label else [0, 1]


def valid(said: Sequence[str | None], labels: Sequence[str], positive: Verdict = "yes") -> dict[str, float]:
    """``invalid``: the share of invalid answers in percent; ``f1_valid``: F1 of the others in percent, 0 for none."""
    terms = [f1_terms(one, label, positive) for one, label in zip(said, labels, strict=True)]
    below = sum(term[1] for term in terms)
    return {
        "invalid": 100 * sum(one is None for one in said) / len(said),
        "f1_valid": 100 * sum(term[0] for term in terms) / below if below else 0.0,
    }


def notes(scores: Mapping[str, Any], official: str) -> list[str]:
    """That more than a few answers are invalid, what happens to them officially, and the F1 of the others."""
    if scores["invalid"] <= FEW:
        return []
    return [
        f"{scores['invalid']:.1f} % of the answers say neither yes nor no ({official}); the F1 of the others is "
        f"{scores['f1_valid']:.2f}"
    ]
