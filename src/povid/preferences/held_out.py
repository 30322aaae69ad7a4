"""Records held out for validation: whole pictures, so that none is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from povid.fault import Fault
from povid.files import digest
from povid.preferences.pictures import PICTURE_BYTES, picture_digests
from povid.preferences.triple import Triple


def hold_out(triples: Sequence[Triple], share: float) -> tuple[list[Triple], list[Triple]]:
    """Split records into those to train on and those held out, each in their order.

    ``share`` (0 to 1) of the different pictures are held out, with all their records. Which ones depends on the content
    of the pictures alone: not on a seed, on names, or on the order of the records.

    Raises:
        Fault: the share leaves one of the sides empty.
    """
    pictures = _digests(triples)
    ranked = sorted(set(pictures), key=lambda found: hashlib.sha256(found.encode()).digest())
    chosen = set(ranked[: round(share * len(ranked))])
    kept = [triple for triple, found in zip(triples, pictures) if found not in chosen]
    held = [triple for triple, found in zip(triples, pictures) if found in chosen]
    if not kept or not held:
        side = "to train on" if held else "for validation"
        raise Fault(
            f"data.validation: a share of {share} of {len(ranked)} pictures leaves no record {side}; choose another "
            "share, or use more records"
        )
    return kept, held


def picture_on_both_sides(kept: Sequence[Triple], held: Sequence[Triple]) -> tuple[Triple, Triple] | None:
    """The first record of ``held`` whose picture a record of ``kept`` has too, and that record; None if all differ."""
    known = dict(zip(_digests(kept), kept))
    for triple, found in zip(held, _digests(held)):
        if found in known:
            return triple, known[found]
    return None


def _digests(triples: Sequence[Triple]) -> list[str]:
    return picture_digests([triple.image for triple in triples], _digest)


def _digest(picture: Path) -> str:
    try:
        return digest(picture, PICTURE_BYTES)
    except OSError:  # the data check names it
        return str(picture)
