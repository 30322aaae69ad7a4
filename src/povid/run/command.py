"""``train.py`` and ``povid train``: Hydra composes a configuration, :mod:`povid.run.experiment` runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from povid.fault import Fault, holds_login
from povid.machine import conf_folder, spin_briefly
from povid.run.overrides import explain
from povid.run.quiet import quiet

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
spin_briefly()

jobs_started = 0  # before the first, Hydra's errors are about the command line

# Settings of earlier versions, and what replaces them.
MOVED = {
    "objective.alpha": "objective.1.alpha= (Eq. 3) and objective.2.alpha= (Eq. 5)",
    "objective.beta_text": "objective.2.beta_text=",
    "objective.beta_noise": "objective.2.beta_noise=",
    "objective.beta": "objective=released objective.1.alpha= objective.2.beta=",
    "objective.weight_text": "objective=released objective.2.weight_text=",
    "objective.weight_noise": "objective=released objective.2.weight_noise=",
    "noise.schedule": "noise=sigmoid, noise=linear or noise=cosine",
    "noise.beta_start": "noise.scheduler.beta_start=",
    "noise.beta_end": "noise.scheduler.beta_end=",
    "logger.wandb": "logger=wandb or logger=none",
    "logger.project": "logger.wandb.project=",
    "logger.entity": "logger.wandb.entity=",
    "logger.mode": "logger.wandb.mode=",
    "data.format": "data.format._target_=povid.preferences.formats.NAME.read",
}


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def _job(cfg: DictConfig) -> Any:
    from povid.run.evaluation import optimized
    from povid.run.experiment import run
    from povid.run.processes import first
    from povid.run.quiet import quiet_imported
    from povid.run.signals import Stopped

    global jobs_started
    jobs_started += 1
    quiet()  # again: a launcher may have started this process
    quiet_imported()
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    try:
        results = run(cfg, folder)
        return optimized(results, cfg.optimized_metric) if cfg.optimized_metric and results else None
    except Stopped as stopped:  # and the whole sweep with it
        if first():
            print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(stopped.status if first() else 0)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if job.mode != RunMode.MULTIRUN:
            print(f"error: {sentence}", file=sys.stderr)
            sys.exit(2)
        print(
            f"error in job {job.job.num} ({job.job.override_dirname}): {sentence}\nThe other jobs continue; for the "
            f"tables of those that finish: python -m povid.report {folder.parent}",
            file=sys.stderr,
        )
        raise


def _sentence(error: BaseException | None) -> str | None:
    """The message of the Fault that caused an error, if any."""
    while error is not None:
        if isinstance(error, Fault):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _moved(arguments: list[str]) -> str | None:
    """The error for a setting of an earlier version, if the command line has one."""
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        # A whole value for what is a group now is spelled like the group's choice and is Hydra's to answer.
        if key in MOVED and not (key == "data.format" and value.startswith("{")):
            return f"{argument}: {key} has moved; use {MOVED[key]}"
    return None


def _resumes_nothing(arguments: list[str]) -> bool:
    """Whether a command line says resume=true and no folder, which would start a new run."""
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    return given.get("resume", "").lower() == "true" and not {"hydra.run.dir", "hydra.sweep.dir"} & {*given}


def main() -> int:
    """Run ``sys.argv``. Returns 0, 2 for an error that the user can fix, 143 or 130 for a run stopped by a signal."""
    from povid.run.resume import expand

    quiet()
    try:
        if moved := _moved(sys.argv[1:]):
            raise Fault(moved)
        if any(holds_login(argument) for argument in sys.argv[1:]):
            raise Fault(
                "an argument is an address with a user name or password, which would be written to the run folder; "
                "leave it out and put the key into the environment variable that api_key_env names"
            )
        for place in ("hydra.run.dir", "hydra.sweep.dir"):
            if any(argument.strip("'\"") == f"{place}=" for argument in sys.argv[1:]):
                raise Fault(f"{place}= names no folder; name one, or leave it out")
        if "resume=latest" in sys.argv:
            sys.argv[1:] = expand(sys.argv[1:])
            print("resume=latest:", *sys.argv[1:])
        elif _resumes_nothing(sys.argv[1:]):
            raise Fault(
                "resume=true needs the folder of the run: add hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for "
                "a sweep), or use resume=latest for the newest that is unfinished"
            )
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    try:
        _job()
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        if jobs_started:
            raise
        print(f"error: {explain(error, sys.argv[1:])}", file=sys.stderr)
        return 2
    except OSError as error:
        if jobs_started:
            raise
        print(
            f"error: {error.filename or 'the run folder'}: {error.strerror}; free space or choose another folder with "
            "outputs= or hydra.run.dir=",
            file=sys.stderr,
        )
        return 2
    except Fault:  # raised by a job, which has printed it
        return 2
    except KeyboardInterrupt:  # before or between the jobs
        return 130
    return 0
