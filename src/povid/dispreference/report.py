"""The report of a run: figures as JSON and text, and a page of twenty triples."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from povid.dispreference.gates import has_reason
from povid.files import write_json, write_text
from povid.preferences.differences import changes, overlap, words
from povid.preferences.show import Box, Extra, write_page
from povid.preferences.triple import Triple

SHOWN = 20  # triples on the page


def figures(
    triples: Sequence[Triple],
    kinds: Sequence[str],
    rejects: Sequence[tuple[str, Sequence[str]]],
    reasons: Mapping[str, int],
) -> dict[str, Any]:
    """Counts over the last answers of ``triples``.

    ``hallucinations`` counts records by what was changed in them (a record may count under several); "reasoning" are
    answers of the form Reason, Result. ``length_ratio`` is words of the dispreferred over words of the preferred.
    """
    found, added, ratios, shared = Counter(), Counter(), [], []
    for triple in triples:
        good, bad = triple.preferred[-1].text, triple.dispreferred[-1].text
        difference = changes(good, bad)
        found.update(
            "object co-occurrence" if kind == "object" and difference.objects else kind for kind in difference.kinds
        )
        found.update(["reasoning"] * has_reason(bad))
        added.update(difference.objects)
        ratios.append(len(words(bad)) / max(1, len(words(good))))
        shared.append(overlap(good, bad))
    return {
        "written": len(triples),
        "set_aside": len(rejects),
        "prompts": dict(Counter(kinds)),
        "hallucinations": dict(found.most_common()),
        "length_ratio": _spread(ratios),
        "overlap": _spread(shared),
        "injected_objects": dict(added.most_common(30)),
        "replies_refused": dict(Counter(reasons).most_common()),
        "set_aside_for": dict(Counter(tries[-1] for _, tries in rejects if tries).most_common()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.05, 0.95)}
    return {
        "mean": round(statistics.mean(values), 3),
        "median": round(statistics.median(values), 3),
        "p5": round(at[0.05], 3),
        "p95": round(at[0.95], 3),
    }


def write_report(
    folder: Path,
    title: str,
    triples: Sequence[Triple],
    numbers: Mapping[str, Any],
    rejects: Sequence[tuple[str, Sequence[str]]],
) -> None:
    """Write report.json, rejects.jsonl and, if there are triples, report.html into ``folder``."""
    write_json(folder / "report.json", numbers)
    lines = [json.dumps({"id": id, "reasons": list(tries)}, ensure_ascii=False) for id, tries in rejects]
    write_text(folder / "rejects.jsonl", "".join(line + "\n" for line in lines))
    if triples:
        boxes = (
            Box("Hallucinations (records)", list(numbers["hallucinations"].items())),
            Box("Most injected objects", list(numbers["injected_objects"].items())[:10]),
            Box("Replies refused, by reason", list(numbers["replies_refused"].items())),
            Box("Records set aside, by last reason", list(numbers["set_aside_for"].items())),
        )
        ratio = numbers["length_ratio"]
        prompts = ", ".join(f"{count} {name}" for name, count in numbers["prompts"].items())
        text = (
            f"{numbers['written']} written ({prompts}), {numbers['set_aside']} set aside. Dispreferred over "
            f"preferred length: median {ratio['median']}, 90 % between {ratio['p5']} and {ratio['p95']}."
        )
        write_page(
            triples,
            folder / "report.html",
            title=title,
            count=SHOWN,
            extra=Extra("Generation", text, boxes),
            noise_steps=(),
        )


def summary(numbers: Mapping[str, Any]) -> str:
    """The figures for a terminal, one line each."""

    def listed(key: str, most: int = 8) -> str:
        return ", ".join(f"{name} {count}" for name, count in list(numbers[key].items())[:most]) or "none"

    lines = [
        f"{numbers['written']} records written, {numbers['set_aside']} set aside ({listed('set_aside_for')})",
        f"hallucinations: {listed('hallucinations')}",
        f"most injected: {listed('injected_objects')}",
    ]
    if numbers["replies_refused"]:
        lines.append(f"replies refused: {listed('replies_refused')}")
    if numbers["length_ratio"]:
        lines.append(
            "words of dispreferred per word of preferred: median {median}, 5 % below {p5}, 5 % above {p95}".format(
                **numbers["length_ratio"]
            )
        )
    return "\n".join(lines)
