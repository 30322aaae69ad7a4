"""The cores of a sweep's jobs that run side by side on one machine."""

from __future__ import annotations

import math
import os
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from povid.machine import cores


class ShareOfCores(Callback):
    """Hydra callback of the launchers that run jobs side by side: each gets one share of the machine's cores.

    Threads that wait for each other spin, which costs more than they bring where other processes compute. It sets
    OMP_NUM_THREADS, which the jobs inherit; what the user has set stays.

    Args:
        jobs: how many run at once (joblib's ``n_jobs``, -1 for one per core); None for all jobs of the sweep.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        most = math.inf if self.jobs is None else self.jobs if self.jobs > 0 else cores() + 1 + self.jobs
        beside = min(most, jobs_of(config))
        if beside > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(cores() / beside))))


def jobs_of(config: DictConfig) -> int:
    """How many jobs a sweep starts at once: those of its command line, or as many as its sweeper has in flight."""
    sweeper = config.hydra.sweeper
    if sweeper.get("n_jobs"):  # Optuna's
        return sweeper.n_jobs
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    choices = [each for each in overrides if each.is_choice_sweep() or each.is_range_sweep()]
    jobs = math.prod(len(list(each.sweep_string_iterator())) for each in choices)
    return min(jobs, sweeper.get("max_batch_size") or jobs)
