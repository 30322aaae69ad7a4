"""The preference records of a run: read, rewritten where the configuration says so, and checked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from povid.fault import Fault
from povid.preferences.check import Report
from povid.preferences.check import check as check_records
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Triple
from povid.run.build import make
from povid.run.settings import Settings

log = logging.getLogger(__name__)


def load_triples(settings: Settings) -> list[Triple]:
    """The records of ``data``, their text dispreferences replaced where ``dispreference`` replaces them.

    With ``data.skip_bad`` only the usable ones; the others are logged and counted.
    """
    data = settings.data
    skipped: list[str] | None = [] if data.skip_bad else None
    triples = make(data.format)(Path(data.preferences), Path(data.images), skipped)
    if "text" in settings.ablation.dispreferences:
        triples = settings.dispreference(triples, seed=settings.plain.seed, limit=data.limit, skipped=skipped)
    triples = triples[: data.limit]
    if skipped is not None:
        report = check(settings, triples)
        triples = [triple for triple in triples if triple.id not in report.bad]
        reasons = skipped + [finding.text for finding in report.findings]
        if reasons:
            count = len(skipped) + len(report.bad)
            log.warning("%d records are skipped (data.skip_bad):\n  - %s", count, "\n  - ".join(reasons))
    return triples


def check(settings: Settings, triples: list[Triple], sample: int | None = None) -> Report:
    """Check all records, or a sample of them, for what would stop training."""
    count = prompt_tokens(settings)
    return check_records(triples, sample=sample, limit=settings.model.max_length, tokens=count)


def prompt_tokens(settings: Settings) -> Callable[[Triple], int]:
    """Return a function that counts the tokens of a record's prompt, image included, with a newly loaded processor."""
    template = settings.model.template(settings.model.load_processor())

    def count(triple: Triple) -> int:
        try:
            return len(template.see(template.prompt(triple.question), template.picture(open_picture(triple.image)))[0])
        except Fault:  # the picture is reported separately
            return 0

    return count
