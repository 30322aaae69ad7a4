"""``python -m povid.report compare RUN_A RUN_B``: the answers of two runs to the same questions, compared in pairs.

Intervals come from a bootstrap over pictures, since answers about one picture are not independent: both runs' answers
about a picture are drawn together. Where answers are right or wrong, McNemar's exact test counts the questions that one
run alone answers right. CHAIR is also compared at matched coverage, since it can be lowered by saying less.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from povid.fault import Fault
from povid.files import read_json, write_json

LEVEL = 0.95
BATCH = 500  # resamples at a time
SAME = {"texts": "questions", "pictures": "pictures", "truth": "reference answers"}  # in asked.json: what it is about
AGAIN = "move its results.json away and resume the run: its answers are kept and scored again"


@dataclass(frozen=True)
class Scored:
    """What a run holds of one benchmark: what was asked, the scores, and for each question what "paired" says."""

    folder: Path
    asked: dict[str, Any]
    scores: dict[str, Any]
    paired: list[dict[str, Any]]
    correct: list[bool | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison. Returns the exit status: 0, or 2 after one sentence about what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m povid.report compare", description=__doc__.partition("\n\n")[0])
    parser.add_argument("a", type=Path, metavar="RUN_A", help="folder of a run, with benchmarks/ in it")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="folder of the other run; differences are B - A")
    parser.add_argument("--benchmark", action="append", metavar="NAME", help="only this benchmark; repeatable")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    options = parser.parse_args(arguments)
    try:
        if options.resamples < 100:
            raise Fault(f"--resamples is {options.resamples}; an interval needs at least 100")
        found = compare(options.a, options.b, options.benchmark or (), options.resamples, options.seed)
        if options.json:
            write_json(options.json, found)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.json} cannot be written ({error.strerror}); name another file", file=sys.stderr)
        return 2
    print(text(found))
    return 0


def compare(a: Path, b: Path, only: Sequence[str] = (), resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compare the benchmarks that both runs answered, or those named in ``only``.

    Returns:
        "benchmarks": name → "figures" (name → a, b and difference, each with value, low and high, in percent),
        "mcnemar" (only_a, only_b, p) for answers that are right or wrong, "matched_coverage" for captions, "notes".
        "not_compared": name → reason.

    Raises:
        Fault: a folder is not that of a run, the two have no benchmark in common, or were asked different questions,
            about different pictures, with other reference answers or by another judge.
    """
    shared = _shared(a, b, only)
    found: dict[str, Any] = {"a": str(a), "b": str(b), "resamples": resamples, "seed": seed, "level": LEVEL}
    found |= {"benchmarks": {}, "not_compared": {}}
    for name in shared:
        one, other = (_read(run / "benchmarks" / name) for run in (a, b))
        _check_same(name, one, other)
        if missing := [scored.folder for scored in (one, other) if not any(scored.paired)]:
            reason = (
                f"{missing[0] / 'scores.json'} holds nothing to compare answer by answer; {name} does not offer it, or "
                f"an earlier version scored it (then {AGAIN})"
            )
            if only:
                raise Fault(f"{name}: {reason}")
            found["not_compared"][name] = reason
            continue
        found["benchmarks"][name] = _compared(one, other, resamples, seed)
    return found


def _shared(a: Path, b: Path, only: Sequence[str]) -> list[str]:
    names = []
    for run in (a, b):
        if not (run / "benchmarks").is_dir():
            raise Fault(f"{run} holds no folder benchmarks; name the folder of a run that answered some")
        names.append({file.parent.name for file in (run / "benchmarks").glob("*/scores.json")})
    if absent := [name for name in only if name not in names[0] & names[1]]:
        raise Fault(
            f"{absent[0]} was not scored in {b if absent[0] in names[0] else a}; "
            f"both runs scored {', '.join(sorted(names[0] & names[1])) or 'nothing'}"
        )
    if not names[0] & names[1]:
        raise Fault(f"{a} and {b} scored no benchmark in common; run both with the same benchmarks=")
    return list(dict.fromkeys(only)) or sorted(names[0] & names[1])


def _read(folder: Path) -> Scored:
    asked = read_json(folder / "asked.json", dict, "resume the run to write it again")
    content = read_json(folder / "scores.json", dict, AGAIN, keys=("scores", "records"))
    records = content["records"]
    try:
        paired = [record.get("paired") or {} for record in records]
        correct = [record.get("correct") if "paired" in record else None for record in records]
        for entry in filter(None, paired):
            entry["picture"], [(float(above), float(below)) for above, below in entry["sums"].values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Fault(f"{folder / 'scores.json'} has a record that cannot be compared ({error!r}); {AGAIN}") from None
    return Scored(folder, asked, content["scores"], paired, correct)


def _check_same(name: str, one: Scored, other: Scored) -> None:
    """Raise a Fault unless both runs were asked the same."""
    for key, what in SAME.items():
        if key not in one.asked or one.asked[key] != other.asked.get(key):
            raise Fault(
                f"{name}: {one.folder} and {other.folder} have different {what}, so their answers are not pairs; "
                f"compare runs of the same benchmarks.{name}, or other benchmarks with --benchmark"
            )
    judges = [scored.scores.get("judge") for scored in (one, other)]
    if judges[0] != judges[1]:
        raise Fault(f"{name}: judged by {judges[0]} in {one.folder} and by {judges[1]} in {other.folder}")
    if len(one.paired) != len(other.paired):
        raise Fault(
            f"{name}: {one.folder} has {len(one.paired)} records and {other.folder} {len(other.paired)}; "
            f"scores.json of one of them is not that of its answers; {AGAIN}"
        )


def _compared(one: Scored, other: Scored, resamples: int, seed: int) -> dict[str, Any]:
    entries = [pair for pair in zip(one.paired, other.paired) if all(pair)]
    if apart := [pair for pair in entries if pair[0]["picture"] != pair[1]["picture"]]:
        raise Fault(
            f"{one.folder} and {other.folder} have records about {apart[0][0]['picture']!r} and "
            f"{apart[0][1]['picture']!r} at the same place; {AGAIN}"
        )
    pictures = {json.dumps(entry["picture"]): None for entry, _ in entries}
    if len(pictures) < 2:
        raise Fault(f"{one.folder} is about a single picture; intervals need at least two")
    place = {picture: i for i, picture in enumerate(pictures)}
    where = np.array([place[json.dumps(entry["picture"])] for entry, _ in entries])
    found: dict[str, Any] = {"questions": len(entries), "pictures": len(pictures)}
    names, statistic = _figures(entries, where)
    low_high, values = _bootstrap(statistic, len(pictures), resamples, seed)
    found["figures"] = _named(names, values, low_high)
    right = [(x, y) for x, y in zip(one.correct, other.correct) if isinstance(x, bool) and isinstance(y, bool)]
    if right:
        only_a, only_b = right.count((True, False)), right.count((False, True))
        p = float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
        found["mcnemar"] = {"questions": len(right), "only_a": only_a, "only_b": only_b, "p": p}
    if all(
        "mentions" in entry and {"CHAIR_S", "coverage"} <= entry["sums"].keys() for pair in entries for entry in pair
    ):
        statistic = _matched(entries, where)
        low_high, values = _bootstrap(statistic, len(pictures), resamples, seed)
        matched = _named(["CHAIR_S", "CHAIR_I"], values[1:], low_high[1:])
        found["matched_coverage"] = {"coverage": _interval(values[0], low_high[0])} | matched
    found["notes"] = _notes(one, other)
    return found


def _notes(one: Scored, other: Scored) -> list[str]:
    """What differs between the two besides the answers."""
    notes = []
    if one.asked.get("decoding") != other.asked.get("decoding"):
        said = [
            ", ".join(f"{key} {value}" for key, value in (scored.asked.get("decoding") or {}).items())
            for scored in (one, other)
        ]
        notes.append(f"the answers were decoded with different settings: A {said[0]}; B {said[1]}")
    if one.asked.get("model") == other.asked.get("model"):
        notes.append("both runs have the same identity: the answers are those of one model")
    return notes


def _interval(value: float, low_high: Sequence[float]) -> dict[str, float]:
    return {"value": float(value), "low": float(low_high[0]), "high": float(low_high[1])}


def _named(names: Sequence[str], values: np.ndarray, low_high: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Name → a, b and difference; ``values`` and ``low_high`` hold all of a, all of b and all differences in turn."""
    parts = ("a", "b", "difference")
    return {
        name: {
            part: _interval(values[i + j * len(names)], low_high[i + j * len(names)]) for j, part in enumerate(parts)
        }
        for i, name in enumerate(names)
    }


# Statistics -----------------------------------------------------------------------------------------------------------

Statistic = Callable[[np.ndarray], np.ndarray]
"""[resample, picture] how often each picture was drawn → [figure, resample] the figures in percent."""


def _bootstrap(statistic: Statistic, pictures: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals [figure, 2] over resampled pictures, and the figures themselves."""

    def of_indices(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.atleast_2d(drawn).astype(int)
        figures = statistic(np.stack([np.bincount(row, minlength=pictures) for row in rows]))
        return figures if drawn.ndim > 1 else figures[:, 0]

    values = of_indices(np.arange(pictures))
    result = stats.bootstrap(
        (np.arange(pictures),),
        of_indices,
        n_resamples=resamples,
        batch=BATCH,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.stack([result.confidence_interval.low, result.confidence_interval.high], axis=-1), values


def _figures(entries: Sequence[tuple[Mapping, Mapping]], where: np.ndarray) -> tuple[list[str], Statistic]:
    """The figures that both runs' records have, and how to compute them: mean over groups of 100 x sum / sum."""
    terms: dict[tuple[str, str | None], np.ndarray] = {}
    for (one, other), picture in zip(entries, where):
        for name in one["sums"].keys() & other["sums"].keys():
            table = terms.setdefault((name, one.get("group")), np.zeros((4, int(where.max()) + 1)))
            table[:, picture] += (*one["sums"][name], *other["sums"][name])
    order = [name for pair in entries for name in pair[0]["sums"]]
    names = [name for name in dict.fromkeys(order) if any(name == key for key, _ in terms)]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        both = []
        for name in names:
            sums = [drawn @ table.T for (key, _), table in terms.items() if key == name]
            both.append([np.mean([_percent(s[:, i], s[:, i + 1]) for s in sums], axis=0) for i in (0, 2)])
        a, b = np.array(both).transpose(1, 0, 2)
        return np.concatenate([a, b, b - a])

    return names, statistic


def _percent(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return 100 * np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)


def _matched(entries: Sequence[tuple[Mapping, Mapping]], where: np.ndarray) -> Statistic:
    """Coverage, then CHAIR_S and CHAIR_I of a, of b and their differences, at the coverage that both runs reach.

    The captions of the run with more coverage are cut, all after the same number of mentions; between two numbers, the
    figures are interpolated.
    """
    longest = max(len(entry["mentions"]) for pair in entries for entry in pair)
    curves = []
    for side in (0, 1):
        table = np.zeros((6, longest + 1, int(where.max()) + 1))
        for pair, picture in zip(entries, where):
            sums = pair[side]["sums"]
            letters = np.array(list(pair[side]["mentions"]))
            wrong = running(letters == "h", longest)
            table[0, :, picture] += wrong > 0
            table[1, :, picture] += sums["CHAIR_S"][1]
            table[2, :, picture] += wrong
            table[3, :, picture] += running(letters != "", longest)
            table[4, :, picture] += running(letters == "n", longest)
            table[5, :, picture] += sums["coverage"][1]
        curves.append(table)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        sides = []
        for table in curves:
            s = table @ drawn.T  # [term, mentions, resample]
            sides.append((_percent(s[4], s[5]), _percent(s[0], s[1]), _percent(s[2], s[3])))
        target = np.minimum(sides[0][0][-1], sides[1][0][-1])
        a, b = (
            np.array([at_coverage(target, coverage, values) for values in (chair_s, chair_i)])
            for coverage, chair_s, chair_i in sides
        )
        return np.concatenate([target[None], a, b, b - a])

    return statistic


def running(hits: np.ndarray, longest: int) -> np.ndarray:
    """How many hits are among the first 0, 1 ... ``longest`` mentions."""
    counts = np.concatenate([[0], np.cumsum(hits)])
    return np.concatenate([counts, np.full(longest + 1 - len(counts), counts[-1])])


def at_coverage(target: np.ndarray, coverage: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` where ``coverage`` [mentions, resample] reaches ``target`` [resample], interpolated."""
    return np.array([np.interp(t, coverage[:, i], values[:, i]) for i, t in enumerate(target)])


# Text -----------------------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """The comparison for a terminal; * marks a difference whose interval leaves out 0."""
    lines = [
        f"A  {found['a']}",
        f"B  {found['b']}",
        f"Differences are B − A. {100 * found['level']:.0f} % intervals from {found['resamples']:,} resamples of whole "
        "pictures; * where the interval leaves out 0.",
    ]
    for name, one in found["benchmarks"].items():
        lines += ["", f"{name}: {one['questions']} questions about {one['pictures']} pictures"]
        lines += [f"note: {note}" for note in one["notes"]] + _rows(one["figures"])
        if tested := one.get("mcnemar"):
            lines.append(
                f"McNemar: of {tested['questions']} questions only A is right in {tested['only_a']}, only B in "
                f"{tested['only_b']}; p = {tested['p']:.2g}, as if the questions were independent"
            )
        if matched := one.get("matched_coverage"):
            lines.append(
                f"At a coverage of {_shown(matched['coverage'])}, the captions of the run that names more cut all "
                "after the same number of mentions:"
            )
            lines += _rows({key: value for key, value in matched.items() if key != "coverage"})
    for name, reason in found["not_compared"].items():
        lines += ["", f"{name} is not compared: {reason}"]
    return "\n".join(lines)


def _rows(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    rows = [("", "A", "B", "B − A")]
    for name, one in figures.items():
        difference = one["difference"]
        mark = "*" if difference["low"] > 0 or difference["high"] < 0 else " "
        rows.append((name, _shown(one["a"]), _shown(one["b"]), f"{_shown(difference, '+')} {mark}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        (row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))).rstrip()
        for row in rows
    ]


def _shown(one: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (f"{one[key]:{sign}.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
