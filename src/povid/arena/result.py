"""The arena's figures: every arm over all worlds and seeds, with intervals, and its difference from the reference.

A figure is the mean over the runs of what each run scores. Its interval comes from a bootstrap that draws worlds, in
each of them seeds, and in each of them pictures, all with replacement; every arm is drawn alike, so that differences
are those of runs in the same world, with the same seed, about the same pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from povid.arena.plan import BASE, Job, Plan
from povid.fault import Fault
from povid.files import read_json
from povid.report.compare import LEVEL, at_coverage, running
from povid.report.runs import Row, Run, group, read

FIGURES = {  # title → benchmark, name among a record's sums
    "CHAIR_S": ("chair", "CHAIR_S"),
    "CHAIR_I": ("chair", "CHAIR_I"),
    "coverage": ("chair", "coverage"),
    "repeats": ("chair", "repeat_rate"),
    "POPE F1": ("pope", "f1"),
    "F1 of valid": ("pope", "f1_valid"),
    "invalid": ("pope", "invalid"),
    "yes": ("pope", "yes_ratio"),
}
MATCHED = "CHAIR_I at equal coverage"
SHARED = ("device", "versions", "weights")  # parts of an identity that are the same for all arms
AGAIN = "move the run's results.json away and run the arena again: its answers are kept and scored again"


@dataclass(frozen=True)
class Interval:
    """A value in percent, and the limits of its interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Standing:
    """What an arm came to. ``differences`` are from the reference, MATCHED among them; empty for the reference."""

    arm: str
    group: str
    steps: int
    setting: str
    figures: dict[str, Interval]
    differences: dict[str, Interval]
    runs: int


@dataclass
class Sums:
    """What the answers of one run add up to, by picture.

    Attributes:
        terms: figure → numerators and denominators [group, 2, picture]; a figure is the mean over its groups.
        curve: hallucinated, all and new true mentions among the first 0, 1 ... of a caption [3, mention, picture].
        there: true objects [picture].
    """

    terms: dict[str, np.ndarray]
    curve: np.ndarray
    there: np.ndarray


def rows(contests: Mapping[str, Sequence[Job]]) -> dict[str, Row]:
    """The row of every arm, after the check that its runs differ in world and seed alone.

    Raises:
        Fault: results cannot be read, runs of an arm differ in something else, or arms were not run on the same
            software, weights or device.
    """
    runs: dict[str, list[Run]] = {}
    for arm, jobs in contests.items():
        for file in (job.folder / "results.json" for job in jobs):
            try:
                runs.setdefault(arm, []).append(read(file))
            except (OSError, ValueError) as error:
                raise Fault(f"{file}: {error}") from None
    every = [run for arm in runs.values() for run in arm]
    for key in sorted({key for run in every for key in run.settings if key.partition(".")[0] in SHARED}):
        kinds = {run.settings.get(key): run.folder for run in every}
        if len(kinds) > 1:
            listed = "; ".join(f"{value} in {folder}" for value, folder in kinds.items())
            raise Fault(f"the arms were run with different {key} ({listed}); move the older runs away and run again")
    found = {}
    for arm, members in runs.items():
        alike = group(members)
        if len(alike) > 1 or len(alike[0].runs) < len(members):
            apart = "; ".join(row.difference or str(row.runs[0].folder) for row in alike)
            raise Fault(
                f"the runs of {arm} differ in more than world and seed ({apart}) and are not averaged; move those that "
                "an earlier version made away, and run again"
            )
        found[arm] = alike[0]
    return found


def standings(
    plan: Plan, contests: Mapping[str, Sequence[Job]], chosen: Mapping[str, int], resamples: int = 2000, seed: int = 0
) -> list[Standing]:
    """Every arm in the order of the plan, the base first.

    Raises:
        Fault: as :func:`rows`, or two runs in one world answered different questions.
    """
    rows_of = rows(contests)
    worlds = plan.evaluation.worlds
    asked: dict[tuple[int, str], Any] = {}
    sums: dict[str, list[list[Sums]]] = {}
    for arm, jobs in contests.items():
        sums[arm] = [[] for _ in worlds]
        for job in jobs:
            sums[arm][worlds.index(job.world)].append(_sums(job, asked))
    values, differences = _bootstrap(sums, plan.reference, resamples, seed)
    titles = list(FIGURES)
    found = []
    for arm in contests:
        row = rows_of[arm]
        found.append(
            Standing(
                arm,
                plan.group_of.get(arm, ""),
                row.steps,
                plan.tuning.grid[chosen[arm]] if arm != BASE else "",
                {title: _interval(values[arm][:, i]) for i, title in enumerate(titles)},
                {title: _interval(differences[arm][:, i]) for i, title in enumerate([*titles, MATCHED])}
                if arm != plan.reference
                else {},
                len(row.runs),
            )
        )
    return found


def _interval(column: np.ndarray) -> Interval:
    """The first entry is the value itself, the others are resamples."""
    share = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(column[1:], [share, 100 - share])
    return Interval(float(column[0]), float(low), float(high))


# Reading --------------------------------------------------------------------------------------------------------------


def _sums(job: Job, asked: dict[tuple[int, str], Any]) -> Sums:
    """The sums of one run; ``asked`` remembers, by world and benchmark, what the first run there was asked."""
    terms: dict[str, np.ndarray] = {}
    curve = there = np.zeros(0)
    for benchmark in dict.fromkeys(name for name, _ in FIGURES.values()):
        folder = job.folder / "benchmarks" / benchmark
        questions = read_json(folder / "asked.json", dict, AGAIN, ("texts", "pictures", "truth"))
        same = {key: questions[key] for key in ("texts", "pictures", "truth")}
        if asked.setdefault((job.world, benchmark), same) != same:
            raise Fault(f"{folder} holds answers to other questions than other arms in world {job.world}; {AGAIN}")
        records = read_json(folder / "scores.json", dict, AGAIN, ("records",))["records"]
        try:
            entries = [record["paired"] for record in records]
            pictures = {picture: i for i, picture in enumerate(dict.fromkeys(entry["picture"] for entry in entries))}
            groups = {name: i for i, name in enumerate(dict.fromkeys(entry.get("group") for entry in entries))}
            where = np.array([pictures[entry["picture"]] for entry in entries])
            which = np.array([groups[entry.get("group")] for entry in entries])
            for title, (_, name) in ((t, source) for t, source in FIGURES.items() if source[0] == benchmark):
                table = np.zeros((len(groups), 2, len(pictures)))
                np.add.at(table.transpose(0, 2, 1), (which, where), [entry["sums"][name] for entry in entries])
                terms[title] = table
            if benchmark == "chair":
                curve, there = _curve(entries)
        except (KeyError, TypeError, ValueError) as error:
            raise Fault(f"{folder / 'scores.json'} cannot be compared ({error!r}); {AGAIN}") from None
    return Sums(terms, curve, there)


def _curve(entries: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(entry["mentions"]) for entry in entries)
    curve = np.zeros((3, longest + 1, len(entries)))
    for i, entry in enumerate(entries):
        letters = np.array(list(entry["mentions"]))
        for term, hits in enumerate((letters == "h", letters != "", letters == "n")):
            curve[term, :, i] = running(hits, longest)
    return curve, np.array([entry["sums"]["coverage"][1] for entry in entries])


# Statistics -----------------------------------------------------------------------------------------------------------


def _bootstrap(
    sums: Mapping[str, list[list[Sums]]], reference: str, resamples: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By arm [1 + resamples, figure]: the figures, and their differences from the reference with MATCHED behind them.

    The first row is that of all runs and pictures, each once.
    """
    worlds = len(next(iter(sums.values())))
    seeds = max(len(runs) for arm in sums.values() for runs in arm)
    values = {arm: np.zeros((1 + resamples, len(FIGURES))) for arm in sums}
    matched = {arm: np.zeros(1 + resamples) for arm in sums}
    for rows_, world, drawn, counts in _draws(sums, worlds, seeds, resamples, seed):
        of_reference = [_coverage_and_chair(run, counts["chair"]) for run in sums[reference][world]]
        for arm, runs_of in sums.items():
            runs = runs_of[world]
            use = drawn % len(runs)  # the base has one run in each world
            each = np.stack([_figures(run, counts) for run in runs])  # [run, row, figure]
            values[arm][rows_] += each[use.T, np.arange(len(rows_))].mean(0) / worlds
            curves = [_coverage_and_chair(run, counts["chair"]) for run in runs]
            pairs = {(int(u), int(d)) for u, d in zip(use.ravel(), drawn.ravel())}
            gap = {(u, d): _gap(curves[u], of_reference[d % len(of_reference)]) for u, d in pairs}
            stacked = np.zeros(use.shape)
            for (u, d), found in gap.items():
                stacked += np.where((use == u) & (drawn == d), found[:, None], 0)
            matched[arm][rows_] += stacked.mean(1) / worlds
    differences = {
        arm: np.column_stack([values[arm] - values[reference], matched[arm]]) for arm in sums if arm != reference
    }
    return values, differences


def _draws(
    sums: Mapping[str, list[list[Sums]]], worlds: int, seeds: int, resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, int, np.ndarray, dict[str, np.ndarray]]]:
    """(rows, world, seeds drawn [row, seed], by benchmark how often each picture was drawn [row, picture]).

    In every row every place among ``worlds`` is filled once, by any world; row 0 has all of them, undrawn.
    """
    rng = np.random.default_rng(seed)
    one = next(iter(sums.values()))
    sizes = [
        {name: runs[0].terms[title].shape[-1] for title, (name, _) in FIGURES.items()} for runs in one
    ]  # pictures of each world
    for world in range(worlds):
        everything = {name: np.ones((1, size)) for name, size in sizes[world].items()}
        yield np.array([0]), world, np.arange(seeds)[None], everything
    for _ in range(worlds):
        fills = rng.integers(worlds, size=resamples)
        for world in range(worlds):
            rows_ = 1 + np.flatnonzero(fills == world)
            drawn = rng.integers(seeds, size=(len(rows_), seeds))
            counts: dict[int, np.ndarray] = {}
            for size in dict.fromkeys(sizes[world].values()):  # both benchmarks ask about the same pictures
                counts[size] = rng.multinomial(size, np.full(size, 1 / size), size=len(rows_)).astype(float)
            yield rows_, world, drawn, {name: counts[size] for name, size in sizes[world].items()}


def _figures(run: Sums, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """[row, figure] in percent."""
    found = []
    for title, (benchmark, _) in FIGURES.items():
        above, below = np.moveaxis(run.terms[title] @ counts[benchmark].T, 1, 0)  # [group, row]
        found.append(_percent(above, below).mean(0))
    return np.stack(found, axis=-1)


def _coverage_and_chair(run: Sums, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and CHAIR_I in percent if captions end after 0, 1 ... mentions [mention, row]."""
    wrong, said, new = run.curve @ counts.T
    there = np.broadcast_to(run.there @ counts.T, new.shape)
    return _percent(new, there), _percent(wrong, said)


def _gap(own: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """CHAIR_I minus the other's, both at the coverage that both reach [row]."""
    target = np.minimum(own[0][-1], other[0][-1])
    return at_coverage(target, *own) - at_coverage(target, *other)


def _percent(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return 100 * np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
