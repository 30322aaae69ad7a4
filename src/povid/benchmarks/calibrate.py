"""Compare a judge with the official one, on answers whose official grades are published.

LLaVA's repository has the answers of LLaVA-1.5 7B and 13B to MM-Vet and LLaVA-Bench, and several official gradings of
each. The judge grades the same answers. Its bias, its agreement, and the difference in the benchmark's figure get
intervals from a bootstrap over questions: the answers of both models to one question are drawn together.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from povid.benchmarks import llava_format
from povid.benchmarks.benchmark import Benchmark, Source
from povid.benchmarks.judge import Judge
from povid.fault import Fault
from povid.model.question import Question

LEVEL = 95  # percent
RESAMPLES = 2000
COMMIT = "32cebc3809441cc40d8ac7b2855d148308741f2a"  # of pull request 1199; as in LLaVA's eval.zip
GITHUB = f"https://raw.githubusercontent.com/haotian-liu/LLaVA/{COMMIT}/playground/data/eval"
ALL = "all"

Rating = Mapping[str, float]
"""What a judge says about one answer: name → value; empty if it could not be read."""
Ratings = Mapping[str, np.ndarray]
"""Name → values over questions in the last axis, NaN where there is none."""


def source(path: str, size: int, sha256: str) -> Source:
    """A file of LLaVA's evaluation, kept in ``graded/``."""
    return Source(f"{GITHUB}/{path}", f"graded/{path.rpartition('/')[2]}", size, sha256)


@dataclass(frozen=True)
class Published:
    """The answers of one model, in the order of the questions, and the official gradings of them."""

    name: str
    answers: list[str]
    gradings: list[list[Rating]]


class Calibrated(ABC):
    """What a benchmark has whose judge can be compared with the official one; ``graded`` says where the files are."""

    graded: ClassVar[tuple[Source, ...]]

    @abstractmethod
    def published(self, questions: Sequence[Question]) -> list[Published]:
        """The published answers and gradings. Raises Fault for a missing or broken file."""

    @abstractmethod
    def rating(self, record: Mapping[str, Any]) -> Rating:
        """The judge's rating in a record of the score."""

    @abstractmethod
    def figure(self, ratings: Ratings) -> np.ndarray:
        """The benchmark's figure, over the last axis; ratings that are NaN do not count."""

    @abstractmethod
    def kinds(self, question: Question) -> list[str]:
        """The capabilities or categories of a question."""


def by_question(
    benchmark: Benchmark, questions: Sequence[Question], file: Path, found: Iterable[tuple[str, str, Any]]
) -> list[Any]:
    """The values of (place, question id, value) in the order of the questions; others are left out."""
    known = {name: value for _, name, value in found}
    absent = [question.id for question in questions if str(question.id) not in known]
    if absent:
        raise Fault(
            f"{file} has nothing about question {absent[0]!r} of {benchmark.name}; use files of the same version"
        )
    return [known[str(question.id)] for question in questions]


def calibrate(benchmark: Benchmark, judge: Judge, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Judge the published answers, and compare.

    Returns:
        "judge": as in scores. "answers": model → "official" (the figure of each grading), "judge" (its figure),
        "unreadable" (its replies, also left out of all that follows). "figure" and each rating: kind of question →
        what :func:`_compared` returns. "official_with_itself": rating → "spearman" and "mean_absolute", the mean over
        pairs of official gradings, which no judge can be expected to exceed. "records": every answer's grades.

    Raises:
        Fault: no gradings are published, or their files are missing.
    """
    if not isinstance(benchmark, Calibrated):
        raise Fault(f"no official gradings of {benchmark.name} are published; calibrate mm_vet or llava_bench")
    questions = benchmark.loaded()
    sets = benchmark.published(questions)
    answers: dict[str, Any] = {}
    records, described, judged = [], {}, []
    for one in sets:
        score = benchmark.score(questions, one.answers, judge)
        described = {"judge": score.scores["judge"]}
        ratings = [benchmark.rating(record) for record in score.records]
        judged.append(ratings)
        answers[one.name] = {
            "official": [_float(benchmark.figure(_arrays([grading]))) for grading in one.gradings],
            "judge": _float(benchmark.figure(_arrays([ratings]))),
            "unreadable": sum(not rating for rating in ratings),
        }
        records += [
            {"model": one.name, "id": question.id, "official": [dict(g[n]) for g in one.gradings], "judge": dict(ours)}
            for n, (question, ours) in enumerate(zip(questions, ratings))
        ]
    means = [{name: nanmean(each, axis=0) for name, each in _arrays(one.gradings).items()} for one in sets]
    official = {name: np.array([mean[name] for mean in means]) for name in means[0]}
    ours = _arrays(judged)
    for name in official:  # an answer counts where both could be read
        unread = np.isnan(official[name]) | np.isnan(ours[name])
        official[name][unread] = ours[name][unread] = np.nan
    kinds = {ALL: np.arange(len(questions))}
    named = [benchmark.kinds(question) for question in questions]
    for kind in sorted({kind for each in named for kind in each}):
        kinds[kind] = np.array([n for n, each in enumerate(named) if kind in each])
    compared = {
        kind: _compared(benchmark.figure, official, ours, chosen, resamples, np.random.default_rng(seed))
        for kind, chosen in kinds.items()
    }
    return {
        "benchmark": benchmark.name,
        **described,
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "questions": len(questions),
        "limit": benchmark.limited,
        "answers": answers,
        **{part: {kind: compared[kind][part] for kind in kinds} for part in compared[ALL]},
        "official_with_itself": {name: _itself(sets, name) for name in official},
        "records": records,
    }


def _compared(
    figure: Callable[[Ratings], np.ndarray],
    official: Ratings,
    ours: Ratings,
    chosen: np.ndarray,
    resamples: int,
    random: np.random.Generator,
) -> dict[str, dict[str, Any]]:
    """The two judges on some questions.

    Returns:
        "figure": "official", "judge", "difference" with "low" and "high". Rating → "n" answers, "official" and "judge"
        (means), "bias" (mean of judge - official) with its interval, "mean_absolute" difference, "spearman" with its
        interval and "kendall" (tau-b); None where nothing varies.
    """
    draws = chosen[random.integers(len(chosen), size=(resamples, len(chosen)))]

    def differences(index: np.ndarray) -> np.ndarray:
        sides = [figure({name: values[:, index] for name, values in side.items()}) for side in (ours, official)]
        return nanmean(sides[0] - sides[1], axis=0)

    value = differences(chosen)
    sides = {
        key: _float(nanmean(figure({name: values[:, chosen] for name, values in side.items()})))
        for key, side in (("official", official), ("judge", ours))
    }
    found: dict[str, dict[str, Any]] = {"figure": {**sides, **_interval("difference", value, differences(draws))}}
    for name in official:
        pairs = official[name][:, chosen].ravel(), ours[name][:, chosen].ravel()
        gap = ours[name] - official[name]
        biases = nanmean(gap[:, draws], axis=(0, 2))
        drawn = [np.moveaxis(side[name][:, draws], 0, -1).reshape(len(draws), -1) for side in (official, ours)]
        found[name] = {
            "n": int(np.isfinite(pairs[0]).sum()),
            "official": _float(nanmean(pairs[0])),
            "judge": _float(nanmean(pairs[1])),
            **_interval("bias", nanmean(gap[:, chosen]), biases),
            "mean_absolute": _float(nanmean(np.abs(gap[:, chosen]))),
            **_interval("spearman", _spearman(*pairs), _spearman(*drawn), "spearman_"),
            "kendall": _kendall(*pairs),
        }
    return found


def _arrays(sets: Sequence[Sequence[Rating]]) -> dict[str, np.ndarray]:
    """Name → [set, question]."""
    names = dict.fromkeys(name for ratings in sets for rating in ratings for name in rating)
    return {name: np.array([[r.get(name, math.nan) for r in ratings] for ratings in sets], float) for name in names}


def _itself(sets: Sequence[Published], name: str) -> dict[str, float | None]:
    pairs = [
        [_arrays([grading])[name].ravel() for grading in pair]
        for one in sets
        for pair in itertools.combinations(one.gradings, 2)
    ]
    return {
        "spearman": _float(nanmean(np.array([_spearman(*pair) for pair in pairs]))),
        "mean_absolute": _float(nanmean(np.array([nanmean(np.abs(a - b)) for a, b in pairs]))),
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis of what both have; NaN where one of them does not vary.

    Means of several gradings that differ by rounding alone share their rank.
    """
    from scipy.stats import rankdata  # takes a moment to import, and only calibrating needs it

    a, b = np.where(np.isnan(b), np.nan, a).round(9), np.where(np.isnan(a), np.nan, b).round(9)
    ranks = [rankdata(side, axis=-1, nan_policy="omit") for side in (a, b)]
    x, y = (np.nan_to_num(rank - nanmean(rank, axis=-1)[..., None]) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _kendall(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import kendalltau

    both = np.isfinite(a) & np.isfinite(b)
    return _float(kendalltau(a[both].round(9), b[both].round(9)).statistic) if both.sum() > 1 else None


def _interval(name: str, value: Any, drawn: np.ndarray, prefix: str = "") -> dict[str, float | None]:
    """A value with its percentile interval."""
    finite = drawn[np.isfinite(drawn)]
    ends = np.percentile(finite, [(100 - LEVEL) / 2, (100 + LEVEL) / 2]) if finite.size else (math.nan, math.nan)
    return {name: _float(value), f"{prefix}low": _float(ends[0]), f"{prefix}high": _float(ends[1])}


def nanmean(values: np.ndarray, axis: Any = None) -> Any:
    """The mean of what is not NaN; NaN, without a warning, where nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis) / known.sum(axis)


def _float(value: Any) -> float | None:
    number = float(np.asarray(value).squeeze())
    return number if math.isfinite(number) else None


def text(found: Mapping[str, Any], table: Callable[..., str]) -> str:
    """The figures for a terminal; ``table`` lays out nested figures."""
    judge = found["judge"]
    extra = f", {judge['revision']}" if "revision" in judge else ""
    lines = [
        f"{found['benchmark']}: {judge['model']}{extra} beside the official gradings of {found['questions']} questions",
        f"prompt: {judge['wording']} ({judge['prompt']})",
    ]
    for model, one in found["answers"].items():
        official = ", ".join(_shown(figure) for figure in one["official"])
        unread = f"; replies that could not be read: {one['unreadable']}" if one["unreadable"] else ""
        lines.append(f"{model}: official {official}; judge {_shown(one['judge'])}{unread}")
    lines += [
        "",
        f"figure of the benchmark, and its difference with a {found['level']} % interval over questions",
        table(found["figure"], decimals=1),
    ]
    for name, itself in found["official_with_itself"].items():
        lines += [
            "",
            f"{name}: bias is the mean of judge - official; two official gradings have a Spearman correlation of "
            f"{_shown(itself['spearman'], 2)} and differ by {_shown(itself['mean_absolute'], 2)}",
            table(found[name], decimals=2),
        ]
    return "\n".join(lines)


def _shown(value: float | None, decimals: int = 1) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def graded_file(benchmark: Benchmark, name: str) -> Path:
    """A file of gradings; Fault with the command that downloads it if it is missing."""
    return llava_format.needed(benchmark, [f"graded/{name}"])
