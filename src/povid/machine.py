"""The machine that a run runs on: its packages and versions, where ``conf/`` is, and one setting of its allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions, version
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
SPINS = "1000"  # `python -m povid.bench.spinning` compares it with others; libgomp's own is 300,000
NAMED = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "hydra-core",
    "omegaconf",
    "diffusers",
    "wandb",
    "numpy",
    "pillow",
    "povid",
)


def conf_folder() -> Path:
    """The folder ``conf/``: that of the checkout this file belongs to, else the one installed with the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Inside, an environment variable has a value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spin_briefly() -> None:
    """Let threads that wait for each other sleep soon, so that they leave the cores to other processes.

    libgomp reads it when torch is imported, and so do the processes that this one starts. What the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that a step frees: on a CPU, page faults otherwise take most of a step's time.

    Other C libraries have no mallopt; there nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


def versions() -> dict[str, str]:
    """Python, platform, torch's threads and the packages that numbers depend on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in NAMED},
    }


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor()}, {os.cpu_count()} cores"


def packages() -> str:
    """Every installed package and its version, one a line."""
    return "\n".join(sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)) + "\n"
