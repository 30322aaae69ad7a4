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
    of the pictures alone: not on a seed, on names, or on the order of the records. Pictures that stand together in a
    record count as one, and so does the question of records without a picture.

    Raises:
        Fault: the share leaves one of the sides empty.
    """
    pictures = _groups(_digests(triples))
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
    """The first record of ``held`` with a picture of one of ``kept``, and that record; None if all differ."""
    known = {found: triple for triple, own in zip(kept, _digests(kept)) for found in own}
    for triple, own in zip(held, _digests(held)):
        for found in own:
            if found in known:
                return triple, known[found]
    return None


def _digests(triples: Sequence[Triple]) -> list[tuple[str, ...]]:
    """What names the content of each record's pictures; of a picture that is missing, its path.

    A record without a picture is named by its question.
    """
    shown = [picture for triple in triples for picture in triple.pictures]
    known = dict(zip(shown, picture_digests(shown, _digest)))
    return [tuple(known[picture] for picture in t.pictures) or (f"question {t.question}",) for t in triples]


def _groups(digests: Sequence[Sequence[str]]) -> list[str]:
    """One name for each record, the same for all that are linked by common pictures: the first of their digests."""
    above: dict[str, str] = {}

    def top(found: str) -> str:
        while above.setdefault(found, found) != found:
            found = above[found]
        return found

    for own in digests:
        first, *others = sorted(set(map(top, own)))
        above.update(dict.fromkeys(others, first))
    return [top(own[0]) for own in digests]


def _digest(picture: Path) -> str:
    try:
        return digest(picture, PICTURE_BYTES)
    except OSError:  # the data check names it
        return str(picture)
