"""SIGTERM, Ctrl-C and a cluster's requeue signal, from the first to the last moment of a run.

While a stage trains a signal waits for the end of the step, where a checkpoint is written; at any other time the run
stops at once, since what it had finished is on disk. A second Ctrl-C ends the process there and then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.plugins.environments import SLURMEnvironment

from povid.run.build import is_node, make, target

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # what a shell reports


class Stopped(BaseException):
    """The run was told to stop, has saved what it was doing and has left. Not an error.

    ``status``: the exit status of the command.
    """

    def __init__(self, message: str, status: int = TERMINATED) -> None:
        super().__init__(message)
        self.status = status


class Signals:
    """What a run in ``folder`` does with signals.

    Attributes:
        told: the signal that has arrived, or None.
        requeue: the signal on which a job of a SLURM cluster requeues itself; None for other jobs.
        training: a signal waits, since whoever set this looks at ``told`` at the end of each step.
        launcher: what started this run's other processes, which hear of a signal too, or None.
    """

    def __init__(self, folder: Path, requeue: int | None = None) -> None:
        self.folder, self.requeue = folder, requeue
        self.told: int | None = None
        self.training = False
        self.launcher: Any = None
        self.owner = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, signals are handled here; afterwards as before."""
        if threading.current_thread() is not threading.main_thread():  # Python lets the main thread alone do that
            yield
            return
        before = {number: signal.getsignal(number) for number in self._numbers()}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals (again) from whoever handles them: Lightning's handlers save in the middle of a step."""
        for number in self._numbers():
            signal.signal(number, self._note)

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.told is not None:
            self.stop(self.told, "what is finished is kept")

    def stop(self, number: int, done: str) -> NoReturn:
        """Raise Stopped after ``done``, and requeue the job where the signal asks for it."""
        name = signal.Signals(number).name
        if number == self.requeue and os.environ.get("SLURM_PROCID", "0") == "0":
            array = os.environ.get("SLURM_ARRAY_JOB_ID")
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
            try:
                subprocess.run(["scontrol", "requeue", job], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise Stopped(f"{name}: {done} in {self.folder}; job {job!r} could not be requeued ({error})") from None
            raise Stopped(f"{name}: {done} and requeued as job {job}")
        status = INTERRUPTED if number == signal.SIGINT else TERMINATED
        raise Stopped(f"{name}: {done} in {self.folder}; resume with resume=latest", status)

    def _numbers(self) -> set[int]:
        return {signal.SIGINT, signal.SIGTERM} | ({self.requeue} if self.requeue else set())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a forked loader process has this handler too
            if number != signal.SIGINT:  # Ctrl-C reaches all of them; this run's own process decides what it means
                _die_of(number)
            return
        if number == signal.SIGINT and self.told is not None:
            _die_of(number)
        if self.told is None and self.launcher is not None:
            self.launcher.kill(signal.SIGTERM if number == signal.SIGINT else number)
        if self.told != self.requeue or self.told is None:
            self.told = number
        if not self.training:
            self.check()


def requeue_signal(trainer: Mapping[str, Any]) -> int | None:
    """The signal on which a run with this trainer node requeues its SLURM job; None where it does not."""
    plugins = trainer.get("plugins") or []
    for node in plugins if isinstance(plugins, list) else [plugins]:
        kind = target(node, "trainer.plugins", []) if is_node(node) else None
        if isinstance(kind, type) and issubclass(kind, SLURMEnvironment):
            environment = make(node)
            break
    else:
        environment = SLURMEnvironment() if SLURMEnvironment.detect() else None
    return environment.requeue_signal if environment is not None and environment.auto_requeue else None


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
