"""The data check: lists by record what would stop a training run, before it starts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from povid.preferences.differences import words
from povid.preferences.pictures import examine
from povid.preferences.triple import Image as Shown
from povid.preferences.triple import Triple


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with one record. ``kind`` is image, equal, prompt or unreadable; ``text`` is a whole sentence."""

    record: str
    kind: str
    text: str


@dataclass(slots=True)
class Report:
    """What a check of ``checked`` out of ``records`` found; ``duplicates`` counts ids that are used more than once."""

    records: int
    checked: int
    findings: list[Finding] = field(default_factory=list)
    duplicates: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def bad(self) -> set[str]:
        """Ids of the records with a problem."""
        return {finding.record for finding in self.findings}

    def lines(self) -> list[str]:
        """One line for each problem, then a line of counts."""
        kinds = Counter(finding.kind for finding in self.findings)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        number = len(self.findings)
        found = f"{number} {'problem' if number == 1 else 'problems'} ({counts})" if number else "no problems"
        summary = f"{self.checked} of {self.records} records checked: {found}"
        if self.duplicates:
            summary += f"; ids used more than once: {self.duplicates}"
        return [*(finding.text for finding in self.findings), summary]


def check(
    triples: Sequence[Triple],
    *,
    sample: int | None = None,
    tokens: Callable[[Triple, Sequence[Image]], int] | None = None,
    limit: int = 1024,
    seed: int = 0,
    needs_picture: str = "",
    skipped: Sequence[str] = (),
) -> Report:
    """Check every record, or ``sample`` of them drawn by ``seed``.

    A record has a problem when a picture of it is missing or cannot be decoded, when it has none and needs one, when
    its responses differ only in white space, capitals or punctuation, or when its prompt is too long.

    Args:
        tokens: gives the length of a record's prompt in tokens, those of its pictures included; without it lengths are
            not checked.
        limit: prompts of this many tokens or more are too long, since no response would fit after them.
        needs_picture: what a record without a picture lacks one for; "" if it needs none.
        skipped: sentences about records that a reader skipped (see :mod:`povid.preferences.formats`).
    """
    chosen = list(triples)
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    report = Report(len(triples) + len(skipped), len(chosen) + len(skipped))
    report.findings += [Finding("", "unreadable", sentence) for sentence in skipped]
    report.duplicates = sum(count > 1 for count in Counter(triple.id for triple in triples).values())
    last: Shown = None
    pictures: list[Image | str] = []
    for triple in chosen:
        if needs_picture and not triple.pictures:
            sentence = f"record {triple.id!r} has no picture, and {needs_picture} needs one; remove the record"
            report.findings.append(Finding(triple.id, "image", sentence))
        if triple.image != last:  # records of one picture follow each other
            last, pictures = triple.image, [examine(picture) for picture in triple.pictures]
        faults = [picture for picture in pictures if isinstance(picture, str)]
        report.findings += [Finding(triple.id, "image", f"record {triple.id!r}: {fault}") for fault in faults]
        if _same_words(triple):
            report.findings.append(
                Finding(
                    triple.id,
                    "equal",
                    f"record {triple.id!r}: preferred and dispreferred have "
                    "the same words; write a response that differs or remove the record",
                )
            )
        if tokens is None or faults:
            continue
        if (length := tokens(triple, [picture for picture in pictures if not isinstance(picture, str)])) >= limit:
            report.findings.append(
                Finding(
                    triple.id,
                    "prompt",
                    f"record {triple.id!r}: the prompt takes {length} of "
                    f"{limit} tokens; shorten it, raise the limit or remove the record",
                )
            )
    return report


def _same_words(triple: Triple) -> bool:
    """Whether the responses differ only in white space, capitals or punctuation ("?" and "!" alone do differ)."""
    pairs = [(good.text, bad.text) for good, bad in zip(triple.preferred, triple.dispreferred)]
    return all(words(good) == words(bad) and (words(good) or good.split() == bad.split()) for good, bad in pairs)
