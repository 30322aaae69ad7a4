"""VLFeedback of Silkie: rated completions of a prompt, made into pairs by the official rule (vlf-silkie run_dpo.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.preferences.pictures import find_picture
from povid.preferences.records import gather, label, listing, mapping, member, name_of, one_round, text, without_marker
from povid.preferences.triple import Triple

MOST_COMPLETIONS = 64  # of one prompt; the release has four
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read every pair of a prompt's completions, the one with the higher mean rating over :data:`ASPECTS` preferred.

    As in the official rule a pair is left out when the means tie or a rating is not a number ("N/A"). It is also left
    out when a response is empty or both are equal, since nothing can be learned from it.
    """
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    at = label(record)
    id = name_of(member(record, "id", at), at)
    image = find_picture(member(record, "img_path", at), images, at, "img_path")
    prompt = without_marker(text(member(record, "prompt", at), at, "prompt"), at, "prompt")
    rated = []
    for index, completion in enumerate(_completions(member(record, "completions", at), at)):
        key = f"completions[{index}]"
        completion = mapping(completion, at, key)
        response = text(member(completion, "response", at, key), at, f"{key}.response", empty=True)
        notes = mapping(member(completion, "annotations", at, key), at, f"{key}.annotations")
        ratings = [_rating(notes, aspect, at, key) for aspect in ASPECTS]
        rated.append((index, response, None if None in ratings else sum(ratings) / len(ratings)))
    if len(rated) > MOST_COMPLETIONS:
        raise Fault(
            f"{at}: completions has {len(rated):,} entries, more than the {MOST_COMPLETIONS} that are paired; "
            "shorten the list or remove the record"
        )
    for (i, first, a), (j, second, b) in itertools.combinations(rated, 2):
        if a is None or b is None or a == b or first == second or not first.strip() or not second.strip():
            continue
        good, bad = (first, second) if a > b else (second, first)
        meta = {"ratings": (max(a, b), min(a, b))}
        yield one_round(f"{id}-{i}-{j}", image, prompt, good, bad, "vlfeedback", meta)


def _completions(value: Any, at: str) -> list[Any]:
    if isinstance(value, Mapping):  # the `datasets` library turns a list of objects into an object of lists
        columns = {key: listing(column, at, f"completions.{key}") for key, column in value.items()}
        if len({len(column) for column in columns.values()}) != 1:
            raise Fault(f"{at}: the lists in completions differ in length; fix the record or remove it")
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return listing(value, at, "completions")


def _rating(notes: Mapping[str, Any], aspect: str, at: str, key: str) -> float | None:
    note = mapping(member(notes, aspect, at, f"{key}.annotations"), at, f"{key}.annotations.{aspect}")
    value = note.get("Rating")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        rating = float(value)
    except (ValueError, OverflowError):
        return None
    return rating if math.isfinite(rating) else None
