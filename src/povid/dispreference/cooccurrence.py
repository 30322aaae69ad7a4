"""Dispreferred responses from object statistics, without a model (a baseline for the paper's generator)."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from povid.benchmarks.chair_words import read_synonyms
from povid.dispreference.annotations import picture_of, read_objects
from povid.dispreference.causes import Statistics, learn
from povid.dispreference.rewriting import Rewriting, hallucinate
from povid.dispreference.rows import Made, Row
from povid.fault import Fault
from povid.preferences.differences import words
from povid.preferences.stored import Picture
from povid.preferences.triple import Triple, Turn


class CoOccurrence(Rewriting):
    """Rewrites preferred responses with the objects that usually accompany those in the picture.

    Attributes:
        objects: which objects the pictures hold: COCO's instances JSON or ``{picture: [objects]}``
            (:func:`povid.dispreference.annotations.read_objects`). None: each record's own list ``objects``. What
            responses mention is no annotation, since what they leave out may well be in the picture.
        synonyms: further words for objects, in the form of CHAIR's synonyms.txt.
    """

    name: str = "cooccurrence"
    objects: Path | None = None
    synonyms: Path | None = None

    def __call__(
        self, triples: Sequence[Triple], seed: int = 0, limit: int | None = None, skipped: list[str] | None = None
    ) -> list[Triple]:
        """The first ``limit`` triples, every dispreferred response made from the preferred one (``train.py``).

        Statistics are learned from all ``triples`` and pictures. In a conversation every response that can be changed
        is changed.

        Raises:
            Fault: there is no annotation, or a record cannot be rewritten (unless ``skipped`` takes the sentences).
        """
        learned = self._learn(triples)
        made, bad = [], []
        for triple in triples[:limit]:
            if picture_of(triple.image, triple.id) not in learned.present:
                bad.append(f"record {triple.id!r}: nothing says which objects are in its picture")
                continue
            turns = list(triple.preferred)
            image = triple.image if isinstance(triple.image, Picture) else b""  # else known by the record's id
            for at in range(1, len(turns), 2):
                row = Row(triple.id, image, turns[at - 1].text, turns[at].text, "captioning")
                turns[at] = Turn("assistant", hallucinate(row, learned, seed, self))
            if all(words(new.text) == words(old.text) for new, old in zip(turns, triple.preferred)):
                bad.append(f"record {triple.id!r}: none of its responses can be changed")
            else:
                made.append(replace(triple, dispreferred=tuple(turns)))
        if skipped is not None:
            skipped += bad
        elif bad:
            raise Fault(
                f"dispreference=cooccurrence cannot rewrite {len(bad)} of {len(triples[:limit])} records (first: "
                f"{bad[0]}); complete data.objects, or skip them with data.skip_bad=true"
            )
        if not made:
            raise Fault(
                "dispreference=cooccurrence cannot rewrite any record; check that data.objects is about these pictures"
            )
        return made

    def _learn(self, triples: Sequence[Triple]) -> Statistics:
        present: dict[str, list[str]] = defaultdict(list)
        for triple in triples:
            own = triple.meta.get("objects")
            if isinstance(own, list) and all(isinstance(name, str) for name in own):
                present[picture_of(triple.image, triple.id)] += own
        if self.objects is not None:
            present |= read_objects(self.objects)
        if not present:
            raise Fault(
                "dispreference=cooccurrence needs to know which objects are in the pictures, and these records do not "
                "say; give data.objects=FILE: COCO's instances JSON or {picture: [objects]}"
            )
        responses = (turn.text for triple in triples for turn in triple.preferred if turn.role == "assistant")
        return learn(present, responses, read_synonyms(self.synonyms) if self.synonyms else None)

    # --- for python -m povid.dispreference ---

    def identity(self, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """What the result depends on besides the rows."""
        settings = self.model_dump(mode="json", exclude={"name", "objects", "synonyms"})
        known = json.dumps(self._annotated(), sort_keys=True).encode()
        return {"objects": hashlib.sha256(known).hexdigest(), "seed": seed, **settings}

    def generate(self, rows: Sequence[Row], folder: Path, seed: int) -> Made:
        """A wrong version of every row's answer; statistics are learned from all answers and annotated pictures."""
        synonyms = read_synonyms(self.synonyms) if self.synonyms else None
        learned = learn(self._annotated(), [row.answer for row in rows], synonyms)
        made = Made()
        for row in rows:
            wrong = hallucinate(row, learned, seed, self)
            if picture_of(row.image, row.id) not in learned.present:
                made.rejects.append((row.id, ["no objects of the picture"]))
            elif words(wrong) == words(row.answer):
                made.rejects.append((row.id, ["no edit fits"]))
            else:
                made.triples.append(row.triple(row.answer, wrong))
                made.kinds.append(row.kind)
        return made

    def _annotated(self) -> dict[str, list[str]]:
        if self.objects is None:
            raise Fault("objects is not set; give COCO's instances JSON or an objects.json (objects=FILE)")
        return read_objects(self.objects)
