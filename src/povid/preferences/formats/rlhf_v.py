"""RLHF-V: the column ``text`` packs question, chosen and rejected as JSON (an object, a list, or either in base64)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.preferences.formats.rlaif_v import FIELDS, triples_of
from povid.preferences.records import gather, label, mapping, member, show, text
from povid.preferences.stored import BASE64
from povid.preferences.triple import Triple


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read any of the releases; where a record has no ``idx``, its number is its id."""
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    at = label(record, "idx")
    yield from triples_of(record, _unpacked(member(record, "text", at), at), images, place, "rlhf_v", "text")


def _unpacked(value: Any, at: str) -> Mapping[str, Any]:
    """Question and both responses from ``text``, however the release packed them."""
    if isinstance(value, str):
        packed = text(value, at, "text")
        try:
            if BASE64.fullmatch(packed.rstrip()):
                packed = base64.b64decode(packed, validate=False).decode("utf-8")
            value = json.loads(packed)
        except (ValueError, RecursionError, binascii.Error):
            raise Fault(
                f"{at}: text is not JSON with question, chosen and rejected, found {show(packed)}; fix the record or "
                "remove it"
            ) from None
    if isinstance(value, list) and len(value) == len(FIELDS):
        return dict(zip(FIELDS, value))
    return mapping(value, at, "text")
