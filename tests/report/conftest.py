"""Synthetic run folders, as training writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# SCENES-like levels: row -> (CHAIR_S, CHAIR_I, POPE F1, coverage, words, yes ratio)
LEVELS = {
    "none": (72.0, 34.0, 81.0, 65.0, 19.0, 53.0),
    "text": (50.0, 27.0, 80.0, 51.0, 16.0, 51.0),
    "noise": (60.0, 29.0, 79.0, 66.0, 24.0, 49.0),
    "both": (48.0, 25.0, 82.0, 60.0, 19.0, 51.0),
    "preferred_only": (62.0, 30.0, 79.0, 64.0, 19.7, 50.0),
    "swaps_only": (55.0, 28.0, 80.0, 62.0, 19.5, 50.5),
}


def results(row: str, seed: int, shift: float = 0.0, **changes) -> dict:
    chair_s, chair_i, f1, coverage, words, yes = LEVELS[row]
    return {
        "row": row,
        "ablation": row if row in ("none", "text", "noise", "both") else "text",
        "stage": "all",
        "seed": seed,
        "objective": "paper",
        "noise": {"schedule": "sigmoid", "step": 500, "space": "normalized"},
        "model": "scenes_tiny",
        "data": "scenes",
        "experiment": None,
        "benchmarks": {
            "chair": {
                "CHAIR_S": chair_s + shift,
                "CHAIR_I": chair_i + shift,
                "coverage": coverage + shift,
                "words": words,
                "captions": 300,
            },
            "pope": {"f1": f1 + shift, "yes_ratio": yes, "random": {"f1": f1}},
            "mmhal": {"missing": "no judge is set", "cure": "export POVID_JUDGE_MODEL=..."},
        },
        "adapters": [] if row == "none" else [f"runs/{row}/{seed}/stage_1/adapter"],
        "decoding": {"chair": {"max_new_tokens": 64, "temperature": 0.0}},
        "versions": {"torch": "2.13.0"},
        "timings": {"fit": 20.0 + seed},
        "started": f"2026-01-01T00:00:0{seed}",
        "stages": {"1": {"init_from": f"x{seed}", "adapter": "a", "steps": 25}},
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    """write(row, seed, shift=..., key=value ...) -> the run's folder, with results.json in it."""

    def _write(row: str, seed: int, shift: float = 0.0, folder: str = "", **changes) -> Path:
        place = tmp_path / "outputs" / (folder or f"sweep/{row}/{seed}")
        place.mkdir(parents=True, exist_ok=True)
        (place / "results.json").write_text(json.dumps(results(row, seed, shift, **changes)))
        return place

    return _write


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs"
