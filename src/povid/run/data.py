"""The preference records of a run: read, rewritten where the configuration says so, split and checked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL.Image import Image

from povid.fault import Fault
from povid.method.objectives import ON_DISTORTED
from povid.preferences.check import Report
from povid.preferences.check import check as check_records
from povid.preferences.held_out import hold_out, picture_on_both_sides
from povid.preferences.triple import Triple, Turn
from povid.run.build import make
from povid.run.checking import Checks
from povid.run.settings import Settings

log = logging.getLogger(__name__)


def load_triples(settings: Settings) -> list[Triple]:
    """The records to train on and those held out by a share, with their texts as the run uses them.

    ``data.limit`` uses the first ones only, and ``dispreference`` replaces their dispreferred responses. With
    ``data.skip_bad`` only the usable ones; the others are logged and counted.
    """
    return _read(settings, Path(settings.data.preferences), settings.data.limit)


def split(settings: Settings, triples: list[Triple]) -> tuple[list[Triple], list[Triple]]:
    """The records to train on, and those held out for validation: a share of them, or those of a file, or none.

    Raises:
        Fault: the share leaves a side empty; the file is missing, holds no record, or has a picture in common with the
            records to train on.
    """
    chosen = settings.data.validation
    if chosen is None:
        return triples, []
    if isinstance(chosen, float):
        return hold_out(triples, chosen)
    if not Path(chosen).exists():
        raise Fault(f"data.validation: {chosen} does not exist; name a file of held-out records, a share, or null")
    held = _read(settings, Path(chosen), None)
    if not held:
        raise Fault(f"data.validation: {chosen} holds no record; name another file, a share, or null")
    if both := picture_on_both_sides(triples, held):
        raise Fault(
            f"data.validation: the picture of record {both[0].id!r} in {chosen} is also that of record {both[1].id!r} "
            f"in {settings.data.preferences}; held-out pictures must not be trained on: remove one of the records"
        )
    return triples, held


def held_out_source(settings: Settings) -> str:
    """The file that held-out records come from."""
    chosen = settings.data.validation
    return chosen if isinstance(chosen, str) else settings.data.preferences


def _read(settings: Settings, file: Path, limit: int | None) -> list[Triple]:
    data = settings.data
    skipped: list[str] | None = [] if data.skip_bad else None
    if data.source is not None and not file.exists():
        raise Fault(
            f"data.preferences: {file} does not exist; name another file with data.file, or run python -m "
            f"povid.preferences fetch {data.name}, which downloads it into $POVID_DATA or data"
        )
    triples = make(data.format)(file, Path(data.images), skipped)
    if "text" in settings.ablation.dispreferences:
        triples = settings.dispreference(triples, seed=settings.plain.seed, limit=limit, skipped=skipped)
    triples = triples[:limit]
    lacking = [triple.id for triple in triples if not triple.pictures]
    if lacking and skipped is None and (what := _needs_picture(settings)):
        other = ", or train with ablation=text" if _distorts(settings) else ""
        raise Fault(
            f"{file}: records without a picture: {len(lacking)} of {len(triples)} (first: {lacking[0]!r}); "
            f"{what} needs one: remove them, skip them with data.skip_bad=true{other}"
        )
    if skipped is not None:
        report = check_all(settings, triples)
        triples = [triple for triple in triples if triple.id not in report.bad]
        reasons = skipped + [finding.text for finding in report.findings]
        if reasons:
            count = len(skipped) + len(report.bad)
            log.warning("%d records are skipped (data.skip_bad):\n  - %s", count, "\n  - ".join(reasons))
    return triples


def check(settings: Settings, triples: list[Triple], sample: int | None = None) -> Report:
    """Check all records, or a sample of them, for what would stop training."""
    count = prompt_tokens(settings)
    lacked = "" if all(triple.pictures for triple in triples) else _needs_picture(settings)
    return check_records(triples, sample=sample, limit=settings.model.max_length, tokens=count, needs_picture=lacked)


def _needs_picture(settings: Settings) -> str:
    """What a record needs a picture for: "" if it can do without."""
    if _distorts(settings):
        return "the noise dispreference"
    model = settings.model
    if not model.trainable:
        return ""
    if settings.split and model.train_projector:  # all devices must call it in every step
        return "a projector that is split over devices (model.train_projector=true)"
    return f"model={model.name}" if model.known_architecture().needs_image else ""


def _distorts(settings: Settings) -> bool:
    return any(ON_DISTORTED & terms for terms in settings.terms.values())


def check_all(settings: Settings, triples: list[Triple]) -> Report:
    """Check all records, in as many processes as load data.

    Raises:
        Fault: a process died.
    """
    if not triples:
        return check(settings, triples)
    with Checks(triples, functools.partial(check, settings), max(settings.data.workers, 1)) as checks:
        report = checks.report(complete=True)
    if report.checked < report.records:
        raise Fault(
            "a process that checked records died, most likely because memory ran out; free some, or start fewer with "
            f"data.workers={settings.data.workers // 2}"
        )
    return report


def prompt_tokens(settings: Settings) -> Callable[[Triple, Sequence[Image]], int]:
    """Return a function that counts the tokens of a record's prompt with its pictures, by a newly loaded processor."""
    template = settings.model.template(settings.model.load_processor())

    def count(triple: Triple, pictures: Sequence[Image]) -> int:
        try:
            (encoded,), _ = template.encode([(Turn("user", triple.question),)], tuple(pictures), triple.id)
        except Fault:  # of the record's text; training names it
            return 0
        return len(encoded.input_ids)

    return count
