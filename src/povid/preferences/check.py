"""Data check: what would stop a training run in the middle, found before it starts and listed by record."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from povid.preferences.differences import words
from povid.preferences.records import one_line
from povid.preferences.triple import Triple


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one record. ``kind`` is image, equal, prompt or unreadable; ``text`` is a whole sentence."""

    record: str
    kind: str
    text: str


@dataclass(slots=True)
class Report:
    """What a check found. ``checked`` of ``records`` were looked at; ``duplicates`` counts ids used more than once."""

    records: int
    checked: int
    findings: list[Finding] = field(default_factory=list)
    duplicates: int = 0

    @property
    def sound(self) -> bool:
        return not self.findings

    @property
    def bad(self) -> set[str]:
        """Ids of the records with a fault."""
        return {finding.record for finding in self.findings}

    def lines(self) -> list[str]:
        """The report for a person: one line per fault, then the counts."""
        kinds = Counter(finding.kind for finding in self.findings)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        summary = f"{self.checked} of {self.records} records checked: " + (
            f"{len(self.findings)} faults ({counts})" if self.findings else "no fault"
        )
        if self.duplicates:
            summary += f"; {self.duplicates} ids are used more than once"
        return [*(finding.text for finding in self.findings), summary]


def check(
    triples: Sequence[Triple],
    *,
    sample: int | None = None,
    tokens: Callable[[Triple], int] | None = None,
    limit: int = 1024,
    seed: int = 0,
    skipped: Sequence[str] = (),
) -> Report:
    """Look at every record, or at ``sample`` of them drawn by ``seed``.

    Args:
        tokens: length of a record's prompt in tokens, image tokens included; prompts of ``limit`` tokens or more are
            faults, since no response would fit behind them. Without it lengths are not checked.
        skipped: sentences about records that a reader could not read (see :func:`povid.preferences.formats.read`).

    A record has a fault when its picture is missing or cannot be decoded, when its responses differ in nothing but
    white space, capitals or punctuation, or when its prompt does not fit.
    """
    chosen = list(triples)
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    report = Report(len(triples) + len(skipped), len(chosen) + len(skipped))
    report.findings += [Finding("", "unreadable", sentence) for sentence in skipped]
    report.duplicates = sum(count > 1 for count in Counter(triple.id for triple in triples).values())
    pictures: dict[Path, str | None] = {}
    for triple in chosen:
        if isinstance(triple.image, bytes):
            fault = picture_fault(triple.image)
        else:
            if triple.image not in pictures:
                pictures[triple.image] = picture_fault(triple.image)
            fault = pictures[triple.image]
        if fault:
            report.findings.append(Finding(triple.id, "image", f"record {triple.id!r}: {fault}"))
        if _alike(triple):
            report.findings.append(
                Finding(
                    triple.id,
                    "equal",
                    f"record {triple.id!r}: preferred and dispreferred have "
                    "the same words; write a response that differs or remove the record",
                )
            )
        if tokens is not None and (length := tokens(triple)) >= limit:
            report.findings.append(
                Finding(
                    triple.id,
                    "prompt",
                    f"record {triple.id!r}: the prompt takes {length} of "
                    f"{limit} tokens; shorten it, raise the limit or remove the record",
                )
            )
    return report


def _alike(triple: Triple) -> bool:
    pairs = zip(triple.preferred, triple.dispreferred)
    return all(
        words(good.text) == words(bad.text)
        and bool(words(good.text)) == bool(words(bad.text))
        and (words(good.text) or good.text.split() == bad.text.split())
        for good, bad in pairs
    )


def picture_fault(image: Path | bytes) -> str | None:
    """Why a picture cannot be used, as half a sentence with the cure; None when it decodes whole.

    A picture with more pixels than Pillow's limit against decompression bombs is a fault and is not decoded.
    """
    name = f"picture {image}" if isinstance(image, Path) else f"the picture of {len(image)} bytes"
    try:
        if isinstance(image, Path) and not image.is_file():
            return f"{name} does not exist; put it there or remove the record"
        source = image if isinstance(image, Path) else io.BytesIO(image)
        with Image.open(source) as picture:
            width, height = picture.size
            if width * height > (Image.MAX_IMAGE_PIXELS or 2**62):
                return f"{name} has {width} x {height} pixels, too many to decode safely; scale it down"
            picture.verify()
        if not isinstance(image, Path):
            source.seek(0)
        with Image.open(source) as picture:
            picture.load()
    except Image.DecompressionBombError:
        return f"{name} has far too many pixels to decode safely; scale it down"
    except MemoryError:
        return f"{name} needs more memory than there is; scale it down"
    except Exception as error:  # Pillow's decoders raise whatever the damage leads them into
        return f"{name} cannot be decoded ({one_line(error)}); replace it or remove the record"
    return None
