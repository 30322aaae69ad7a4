"""A whole run at full size: minutes and memory of loading, both stages, a resume and a caption, by the ordinary path.

The model has random weights in its true architecture. They are saved as a sharded checkpoint, from which
``python -m povid.run`` trains in a process of its own. That process is stopped after the first step of stage 2 and the
run is resumed, so that everything a real run does is done once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from povid.bench.subject import Shape, build_model
from povid.fault import Fault
from povid.files import draft, read_json, remove
from povid.model.debug_llava import WORDS, debug_processor

PERIOD = 0.2  # seconds between two looks at the process
SHARD = "2GB"


@dataclass(slots=True)
class Part:
    """What a part of the run took: seconds, and the largest resident size in bytes, of which ``private`` belonged to
    the process alone (the rest are pages of the checkpoint's files, which the system can drop and read again)."""

    seconds: float = 0.0
    resident: int = 0
    private: int = 0


def checkpoint(shape: Shape, folder: Path) -> Path:
    """A checkpoint of the shape's model with random weights and a processor; made in a process of its own if missing.

    Raises:
        Fault: it could not be made, for want of memory or of room on the disk.
    """
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        maker = get_context("spawn").Process(target=_make, args=(shape, folder))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise Fault(
                f"{folder}: the random weights could not be made or saved (status {maker.exitcode}); the model and its "
                "files need about 2 bytes for each weight, in memory and on the disk"
            )
    return folder


def _make(shape: Shape, folder: Path) -> None:
    model: Any = build_model(shape, device="cpu")
    with draft(folder) as place:
        model.save_pretrained(place, max_shard_size=SHARD)
        debug_processor([WORDS], shape.pixels, shape.patch).save_pretrained(place)


def measure(shape: Shape, steps: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train ``steps`` steps of both stages in ``folder``, stop in stage 2, resume, and caption one picture.

    Args:
        shape: the model; its weights are kept in ``folder/weights``.
        folder: the run is in ``folder/run``; one that is there is removed.
        overrides: of train.py, after those that are set here.

    Returns:
        ``parts``: seconds and bytes of each; ``predicted``: bytes of each stage, as the run estimated before training;
        ``commands``: what was run.

    Raises:
        Fault: a command failed; its log is named.
    """
    weights, run = checkpoint(shape, folder / "weights"), folder / "run"
    remove(run)
    command = [
        *(sys.executable, "-m", "povid.run", "model=llava_1_5_7b", f"model.name={shape.name}"),
        *(f"model.path={weights.resolve()}", f"model.dtype={shape.dtype}", "model.gradient_checkpointing=true"),
        *(f"stages.{stage}.max_steps={steps}" for stage in (1, 2)),
        *("benchmarks=[]", "samples=1", "samples_every=null", "logger=none", "reference_cache=false"),
        *(f"outputs={folder}", f"hydra.run.dir={run}"),
        *(["trainer.precision=bf16-mixed"] if shape.dtype == "bfloat16" else []),
        *overrides,
    ]
    parts = {"stage 1": Part(), "stage 2": Part(), "resume and caption": Part()}

    def training() -> str:
        return "stage 2" if (run / "stage_1" / "stage.json").exists() else "stage 1"

    def trained() -> bool:
        return (run / "stage_2" / "metrics.csv").exists()

    _follow(command, folder / "train.log", parts, training, trained)
    if not (run / "results.json").exists():
        _follow([*command, "resume=true"], folder / "resume.log", parts, lambda: "resume and caption", lambda: False)
    notes = {f"stage {n}": _note(run / f"stage_{n}" / "stage.json") for n in (1, 2)}
    return {
        "parts": {name: {slot: getattr(part, slot) for slot in part.__slots__} for name, part in parts.items()},
        "predicted": {name: note["memory"]["needed"] for name, note in notes.items()},
        "steps": {name: note["steps"] for name, note in notes.items()},
        "commands": [command[1:], [*command[1:], "resume=true"]],
    }


def _note(file: Path) -> dict[str, Any]:
    return read_json(file, dict, "remove the folder and measure again", ("memory", "steps"))


def _follow(
    command: list[str], log: Path, parts: dict[str, Part], part: Callable[[], str], enough: Callable[[], bool]
) -> None:
    """Run a command and measure its process; send it SIGTERM, once, when it is ``enough``."""
    import psutil

    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    told, then = False, time.monotonic()
    try:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            one, now = parts[part()], time.monotonic()
            with suppress(psutil.NoSuchProcess):
                memory = seen.memory_info()
                one.resident = max(one.resident, memory.rss)
                one.private = max(one.private, memory.rss - getattr(memory, "shared", 0))
            one.seconds += now - then
            then = now
            if enough() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(PERIOD)
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode not in ((0, 128 + signal.SIGTERM) if told else (0,)):
        raise Fault(f"{' '.join(command[1:])} ended with status {process.returncode}; see {log}")


def table(result: dict[str, Any]) -> str:
    """The figures as text, with the run's own estimate beside what a stage took."""
    gib = 2**30
    lines = [f"{'part':20} {'minutes':>8} {'peak GiB':>9} {'private':>8} {'estimate':>9} {'off by':>7}"]
    for name, part in result["parts"].items():
        line = f"{name:20} {part['seconds'] / 60:8.1f} {part['resident'] / gib:9.2f} {part['private'] / gib:8.2f}"
        if name in result["predicted"]:
            predicted = result["predicted"][name]
            line += f" {predicted / gib:9.2f} {predicted / part['resident'] - 1:+7.0%}"
        lines.append(line)
    return "\n".join(lines)
