"""Runs train.py for every job that is not done, several side by side, each in a process and with threads of its own.

A Hydra sweep is a product of lists and cannot give each arm the setting that was chosen for it, so every job is a
command. A job that was interrupted is resumed, and one that is done is not started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from povid.arena.plan import Job
from povid.fault import Fault
from povid.machine import cores

TRAIN = (sys.executable, "-m", "povid.run")


def command(job: Job, outputs: Path, options: Sequence[str] = ()) -> list[str]:
    """What runs or resumes a job."""
    quoted = str(job.folder).replace("\\", "\\\\").replace("'", "\\'")
    place = [f"outputs={outputs}", f"hydra.run.dir='{quoted}'", "resume=true"]
    return [*TRAIN, *options, *job.overrides, *place]


def run(jobs: Sequence[Job], outputs: Path, processes: int, say: Callable[[str], None], options: Sequence[str]) -> None:
    """Run the jobs that are not done, ``processes`` at a time, in their order.

    Threads that wait for each other spin, which costs more than they bring where other processes compute, so that the
    cores are divided among the processes. What a job prints is in ``FOLDER.log``.

    Raises:
        Fault: jobs failed; the others have run, and running the arena again runs those that failed again.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    threads = str(max(1, cores() // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    running: set[subprocess.Popen] = set()
    lock, stopped, began = threading.Lock(), threading.Event(), time.monotonic()

    def one(job: Job) -> tuple[Job, int, float]:
        log = job.folder.with_name(f"{job.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("wb") as sink, lock:
            if stopped.is_set():
                return job, 0, 0.0
            process = subprocess.Popen(
                command(job, outputs, options),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops them once
            )
            running.add(process)
        status = process.wait()
        with lock:
            running.discard(process)
        return job, status, time.monotonic() - start

    failed = []
    with ThreadPoolExecutor(processes) as pool:
        try:
            for count, future in enumerate(as_completed([pool.submit(one, job) for job in waiting]), 1):
                job, status, seconds = future.result()
                if status or not job.done:
                    failed.append(job)
                left = (time.monotonic() - began) / count * (len(waiting) - count)
                outcome = f"{seconds:.0f} s" if job not in failed else f"failed, see {job.folder.name}.log"
                say(f"{count} of {len(waiting)}: {job.arm} {job.label} ({outcome}); about {left / 60:.0f} min left")
        except BaseException:
            with lock:
                stopped.set()
                for process in running:
                    process.send_signal(signal.SIGTERM)  # saves a checkpoint, from which the job resumes
            raise
    if failed:
        first = failed[0]
        log = first.folder.with_name(f"{first.folder.name}.log")
        raise Fault(
            f"{len(failed)} of {len(waiting)} jobs failed (first: {first.arm} {first.label}: {_last(log)}); see "
            f"{log}, and run the arena again when the reason is gone: what is done is kept"
        )


def _last(log: Path) -> str:
    """The error that a log ends with, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1][:300]
