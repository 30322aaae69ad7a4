"""A data format: a CSV table with the columns image, question, preferred and dispreferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.preferences.pictures import find_picture
from povid.preferences.records import gather, member, number_of, one_round, text
from povid.preferences.triple import Triple


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """One triple for each row; the row's number, from 0, is its id.

    Args:
        preferences: the CSV file. images: the folder of the pictures that its column ``image`` names.
        skipped: takes a sentence for each row that cannot be used; None raises the first one.

    Raises:
        Fault: the file cannot be read, or, without ``skipped``, a row cannot be used.
    """
    return gather(preferences, images, skipped, _triple)


def _triple(row: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    number = number_of(place)
    at = f"record {number}"
    image, question, preferred, dispreferred = (
        text(member(row, column, at), at, column) for column in ("image", "question", "preferred", "dispreferred")
    )
    yield one_round(number, find_picture(image, images, at), question, preferred, dispreferred, "csv_pairs", {})
