"""Sampling and training in turns: each round's pairs come from the policy that the round before has trained.

Round n keeps its pairs in ``OUT.run/round_n/pairs.json`` and trains in the run folder ``OUT.run/round_n/run``. Started
again, a killed command goes through all rounds: what is finished is checked and kept, and an interrupted sampling or
training continues where it was.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.files import write_json
from povid.model.adapters import adapter_chain
from povid.run.experiment import release_memory

OURS = ("adapters", "data.images", "data.preferences", "hydra.run.dir", "init_from", "model", "outputs", "resume")


def repeat(
    sampler: Any,
    rounds: int,
    folder: Path,
    write: Callable[[Any, Path], bool],
    train: Callable[[int, Path, Sequence[Path], Path], None],
) -> list[Path] | None:
    """Sample and train ``rounds`` times; returns the adapters of the last policy, in order, None after an estimate.

    Args:
        sampler: a generator with a policy: its ``model``, ``chain`` (the adapters) and ``trained_on(adapters)``, which
            gives the same generator with another policy.
        write: writes a sampler's pairs to a file; false if it only made an estimate, which ends the rounds.
        train: trains in a run folder: (number of the round, pairs, adapters to begin with, run folder).

    Raises:
        Fault: ``sampler`` has no policy, or one that cannot be trained here.
    """
    if not hasattr(sampler, "trained_on"):
        raise Fault(
            f"rounds={rounds} trains the policy that is sampled from, and dispreference={sampler.name} samples from "
            "none; leave rounds out"
        )
    if not sampler.model.trainable:
        raise Fault(f"rounds={rounds} trains, and a served model cannot be trained here; leave rounds out")
    done = []
    for number in range(1, rounds + 1):
        place = folder / f"round_{number}"
        pairs, run, adapters = place / "pairs.json", place / "run", sampler.chain
        print(f"round {number} of {rounds}", flush=True)
        if not write(sampler, pairs):
            return None
        release_memory()  # of the model that has sampled
        train(number, pairs, adapters, run)
        sampler = sampler.trained_on(adapter_chain(run))
        done.append({"round": number, "pairs": str(pairs), "run": str(run), "adapters": list(map(str, sampler.chain))})
        write_json(folder / "rounds.json", done)
    return sampler.chain


def training(
    number: int,
    pairs: Path,
    adapters: Sequence[Path],
    run: Path,
    *,
    name: str,
    images: Path,
    common: Sequence[str],
    further: str,
) -> None:
    """Train on ``pairs`` in the run folder ``run``, in a process of its own, or resume there.

    Args:
        name: of the row in tables; the round's number is added.
        common: arguments that both commands share: the model, folders of configurations.
        further: overrides of train.py, which may replace ``data=povid_17k ablation=text`` and the row.

    Raises:
        Fault: training failed; its own message has been printed.
        SystemExit: it was stopped by a signal, and has saved what it was doing.
    """
    options, last = [argument for argument in common if argument.startswith("--")], overrides(further)
    usual = {"data": "povid_17k", "ablation": "text", "row": f"{name}_{number}"}
    chosen = {override.partition("=")[0] for override in last}
    command = [
        *(f"{key}={value}" for key, value in usual.items() if key not in chosen),
        *(argument for argument in common if argument not in options),
        f"data.preferences={quoted(pairs)}",
        f"data.images={quoted(images)}",
        f"adapters=[{','.join(quoted(adapter) for adapter in adapters)}]",
        *last,
        f"hydra.run.dir={quoted(run)}",
        "resume=true",
    ]
    status = _call([sys.executable, "-m", "povid.run", *options, *command])
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print(f"stopped in round {number}; start again to resume", file=sys.stderr)
        sys.exit(status)
    if status:
        raise Fault(
            f"the training of round {number} ended with status {status}, for the reason given above; when it is gone, "
            "start again to resume"
        )


def overrides(further: str) -> list[str]:
    """The overrides in ``train="KEY=VALUE ..."``, split as a shell does.

    Raises:
        Fault: one is no override, or sets what each round sets itself.
    """
    try:
        found = shlex.split(further)
    except ValueError as error:
        raise Fault(f"train: {further!r} cannot be split into overrides ({error}); close its quotes") from None
    for override in found:
        key, sign, _ = override.lstrip("+~").partition("=")
        if not sign or not re.match(r"[+~]{0,2}[A-Za-z_]", override):
            raise Fault(f"train: {override!r} is no override KEY=VALUE of train.py")
        if key in OURS or key.startswith("model."):
            raise Fault(f"train: {override!r}: each round sets {key} itself; leave it out")
    return found


def quoted(place: Path | str) -> str:
    """A text as the value of an override, or a path, which becomes absolute."""
    text = str(place.resolve() if isinstance(place, Path) else place)
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _call(command: Sequence[str]) -> int:
    """The exit status of a command, which hears of SIGTERM and Ctrl-C too and is waited for."""
    child, told = None, False

    def tell(*_: Any) -> None:
        nonlocal told
        told = True
        if child is not None:
            child.terminate()

    before = signal.signal(signal.SIGTERM, tell)
    try:
        with subprocess.Popen(command) as child:
            if told:  # while it was started
                child.terminate()
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:
                    child.terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
