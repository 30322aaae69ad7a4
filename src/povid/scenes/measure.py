"""Measures a model of the embedded world: CHAIR and POPE on a prepared split, greedily."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from povid.benchmarks import chair, pope
from povid.model.generation import Answers
from povid.model.loading import LocalModel
from povid.scenes.architecture import FOLDER

LONGEST = 64  # tokens of a caption; the base needs about 45


def answers_of(folder: Path = FOLDER) -> Answers:
    """The saved model as an Answerer, in float32 and without adapter."""
    return LocalModel(name="scenes_tiny", path=str(folder), dtype="float32").answerer(batch_size=60)


def measure(answers: Answers, split: Path) -> dict[str, float]:
    """CHAIR_S, CHAIR_I, coverage, POPE F1 (mean and per split) and yes-ratio in percent; words per caption."""
    questions = chair.load(split)
    decoding = dataclasses.replace(chair.DECODING, max_new_tokens=LONGEST)
    said = chair.score(questions, [text for _, text in sorted(answers(questions, decoding))]).scores
    questions = pope.load(split, suffix="")  # the tiny model knows the bare question
    decoding = dataclasses.replace(pope.DECODING, max_new_tokens=3)
    told = pope.score(questions, [text for _, text in sorted(answers(questions, decoding))]).scores
    return {
        **{key: said[key] for key in ("CHAIR_S", "CHAIR_I", "coverage", "words")},
        "POPE_F1": told["f1"],
        "yes_ratio": told["yes_ratio"],
        **{f"POPE_F1_{name}": told[name]["f1"] for name in ("random", "popular", "adversarial")},
    }
