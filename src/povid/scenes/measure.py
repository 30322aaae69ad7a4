"""Figures of a model in the embedded world: CHAIR and POPE on a prepared split, greedily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.pope import POPE
from povid.model.loading import LocalModel
from povid.model.question import Answerer
from povid.scenes.architecture import FOLDER

LONGEST = 64  # tokens of a caption; the base needs about 45


def answers_of(folder: Path = FOLDER) -> Answerer:
    """The saved model as an Answerer, in float32 and without adapter."""
    return LocalModel(name="scenes_tiny", path=str(folder), dtype="float32").answerer(batch_size=60)


def measure(answers: Answerer, split: Path) -> dict[str, float]:
    """CHAIR_S, CHAIR_I, coverage, POPE F1 (mean and per split) and yes-ratio in percent; words per caption."""
    captions = _scores(CHAIR(data=split, max_new_tokens=LONGEST), answers)
    answered = _scores(POPE(data=split, suffix="", max_new_tokens=3), answers)  # the tiny model knows the bare question
    return {
        **{key: captions[key] for key in ("CHAIR_S", "CHAIR_I", "coverage", "words")},
        "POPE_F1": answered["f1"],
        "yes_ratio": answered["yes_ratio"],
        **{f"POPE_F1_{name}": answered[name]["f1"] for name in ("random", "popular", "adversarial")},
    }


def _scores(benchmark: Benchmark, answers: Answerer) -> dict[str, Any]:
    questions = benchmark.questions()
    return benchmark.score(questions, [text for _, text in sorted(answers(questions, benchmark.decoding))]).scores
