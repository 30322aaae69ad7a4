"""LLaVA-RLHF's human preferences: ``output_1`` or ``output_2`` replaces the last turn of ``conversations``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.preferences.pictures import find_picture
from povid.preferences.records import gather, label, mapping, member, name_of, show, text, turns_of
from povid.preferences.triple import Triple, Turn


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read the release's JSON; ``preference`` is 1 or 2 and says which output is preferred."""
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    at = label(record)
    id = name_of(member(record, "id", at), at)
    turns = turns_of(member(record, "conversations", at), at, "conversations", placeholder=True)
    if turns[-1].role != "assistant":
        raise Fault(
            f"{at}: conversations must end with the gpt turn that the outputs replace, found a human turn; "
            "fix the record or remove it"
        )
    choice = member(record, "preference", at)
    if isinstance(choice, bool) or choice not in (1, 2):
        raise Fault(f"{at}: preference must be 1 or 2, found {show(choice)}; fix the record or remove it")
    outputs = []
    for key in ("output_1", "output_2"):
        output = mapping(member(record, key, at), at, key)
        outputs.append(Turn("assistant", text(member(output, "value", at, key), at, f"{key}.value")))
    good, bad = outputs if choice == 1 else reversed(outputs)
    image = find_picture(member(record, "image", at), images, at)
    yield Triple(id, image, (*turns[:-1], good), (*turns[:-1], bad), "human_preference")
