"""RLAIF-V: flat columns ``image, question, chosen, rejected`` (its muffin/data/datasets.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.preferences.pictures import find_picture
from povid.preferences.records import gather, label, member, name_of, number_of, one_round, text, without_marker
from povid.preferences.triple import Triple

FIELDS = ("question", "chosen", "rejected")


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read the release's parquet shards; where a record has no ``idx``, its number is its id."""
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    yield from triples_of(record, record, images, place, "rlaif_v")


def triples_of(
    record: Mapping[str, Any], fields: Mapping[str, Any], images: Path | None, place: str, source: str, inside: str = ""
) -> Iterator[Triple]:
    """The triple of a record whose question and responses stand in ``fields``, its key ``inside`` (RLHF-V's too)."""
    at = label(record, "idx")
    prefix = f"{inside}." if inside else ""
    question, good, bad = (text(member(fields, key, at, inside), at, prefix + key) for key in FIELDS)
    id = name_of(record["idx"], at, "idx") if record.get("idx") is not None else number_of(place)
    key = "image" if record.get("image") else "image_path"
    image = find_picture(member(record, key, at), images, at, key)
    origin = ("ds_name", "origin_dataset", "origin_split")
    meta = {key: record[key] for key in origin if isinstance(record.get(key), str)}
    yield one_round(id, image, without_marker(question, at, prefix + "question"), good, bad, source, meta)
