"""Trains the base model, saves it in the form that is shipped, and compares its figures with the shipped model's."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from povid.fault import Fault
from povid.files import draft, write_json
from povid.machine import keep_freed_memory
from povid.scenes.architecture import FOLDER, make_model, make_processor
from povid.scenes.measure import answers_of, measure
from povid.scenes.scene import BASE_PARTNER, HARD_PARTNER
from povid.scenes.training import Course, teach
from povid.scenes.world import prepare

PICTURES = 300  # of each split that is measured


def build(folder: Path, seed: int = 0, course: Course | None = None) -> dict[str, dict[str, float]]:
    """Train the base model, write it with its figures to ``folder`` (which must not exist) and print them.

    Returns the figures on the tuning split (``tuning``) and on new scenes of the kind it learnt from (``habitual``).
    """
    if folder.exists():
        raise Fault(f"{folder} already exists; remove it or choose another folder for the base model")
    keep_freed_memory()
    started = time.monotonic()
    processor = make_processor()
    torch.manual_seed(seed)
    model = make_model(processor.tokenizer)
    for _ in teach(processor, model, seed, course or Course(), lambda line: print(line, flush=True)):
        pass
    print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
    with draft(folder) as beside:
        beside.mkdir()
        save(model, processor, beside)
        figures = measure_base(beside)
        write_json(beside / "figures.json", figures)
    shipped = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    for split, values in figures.items():
        print(f"{split:12} {'made':>8} {'shipped':>8}")
        for name, value in values.items():
            print(f"  {name:20} {value:7.1f} {shipped[split][name]:8.1f}")
    print(f"the model is in {folder}")
    return figures


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write model and processor, the weights rounded to float16; they load as float32."""
    rounded = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.config.dtype = torch.float32
    model.save_pretrained(folder, state_dict=rounded)
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)


def measure_base(folder: Path) -> dict[str, dict[str, float]]:
    """Figures of a saved model on the tuning split and on as many scenes with the partners that it learnt."""
    answers = answers_of(folder)
    with tempfile.TemporaryDirectory() as worlds:
        figures = {}
        for name, partner in (("tuning", HARD_PARTNER), ("habitual", BASE_PARTNER)):
            world = prepare(Path(worlds) / name, preferences=0, tuning=PICTURES, evaluation=0, partner=partner)
            figures[name] = {key: round(value, 2) for key, value in measure(answers, world / "tuning").items()}
    return figures
