"""A run's folder belongs to one process while the run lasts, a sweep's to the command that started it.

The lock is the operating system's, on the file ``.lock`` in the folder: it ends with the process that holds it, however
that ends, and the file stays. A loader process that outlives its parent does not keep it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from povid.fault import Fault

NAME = ".lock"


def take(folder: Path) -> FileLock:
    """Lock a folder, which is made if it is missing, until ``release()`` or the end of this process.

    Raises:
        Fault: another process holds it, or the folder cannot be written.
    """
    lock = FileLock(folder / NAME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # somebody may be looking whether it is free
    except Timeout:
        raise Fault(
            f"{folder} is in use by a run in progress; wait for it or stop it, or choose another folder with "
            "hydra.run.dir= (hydra.sweep.dir= for a sweep)"
        ) from None
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None
    return lock


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is locked (:func:`take`)."""
    lock = take(folder)
    try:
        yield
    finally:
        lock.release()


def in_progress(folder: Path) -> bool:
    """Whether a process on this file system holds the folder at this moment."""
    if not (folder / NAME).exists():
        return False
    try:
        with FileLock(folder / NAME, blocking=False):
            return False
    except (Timeout, OSError):  # a file that this user may not lock belongs to somebody else's run
        return True


class SweepLock(Callback):
    """Hydra callback: the command that starts a sweep holds the sweep's folder until it ends.

    A second command in the same folder, or one in the folder of another sweep that does not say ``resume=true``, exits
    with status 2 before it writes anything there.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            self.lock = take(folder)
            if (folder / "multirun.yaml").exists() and not config.resume:
                raise Fault(f"{folder} holds a sweep already; choose another hydra.sweep.dir, or add resume=true")
        except Fault as fault:
            print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)  # Hydra turns any other exception of a callback into a warning

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send callbacks to the processes of the jobs, and the lock stays here
