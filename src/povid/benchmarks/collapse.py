"""Signs that a policy collapses: answers that repeat themselves, and answers that answer nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

NGRAM = 4
_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def repeat_rate(answers: Sequence[str]) -> float:
    """Percent of the sequences of four words that stand earlier in the same answer, the mean over the answers.

    seq-rep-4 of Welleck et al. 2020 (Neural text generation with unlikelihood training), on words. An answer of fewer
    than four words repeats nothing.
    """
    rates = []
    for answer in answers:
        words = answer.lower().split()
        sequences = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        rates.append(1 - len(set(sequences)) / len(sequences) if sequences else 0.0)
    return 100 * sum(rates) / len(rates) if rates else 0.0


def neither_rate(answers: Sequence[str]) -> float:
    """Percent of the answers that hold neither the word "yes" nor the word "no"."""
    return 100 * sum(not _YES_OR_NO.search(answer) for answer in answers) / len(answers) if answers else 0.0
