"""The one door: Hydra composes a configuration, povid.run.experiment runs it.

python train.py                                    all stages of ablation=both on the embedded world
python train.py stage=1
python train.py -m ablation=none,text,noise,both   Table 3
python train.py resume=latest                      go on with what was interrupted, a run or a sweep
python train.py --cfg job                          what a command line amounts to
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

TERMINATED = 128 + 15  # what a shell reports of a process that SIGTERM ended
begun = 0  # jobs; before the first, an error of Hydra's is about the command line


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    from povid.run.checkpoint import Stopped
    from povid.run.experiment import run
    from povid.run.processes import first

    global begun
    begun += 1
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    try:
        run(cfg, folder)
    except Stopped as stopped:  # a whole sweep stops with its job
        if first():
            print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(TERMINATED if first() else 0)
    except Exception as error:
        sentence = told(error)
        if sentence is None:
            raise
        if job.mode != RunMode.MULTIRUN:
            print(f"error: {sentence}", file=sys.stderr)
            sys.exit(2)
        print(
            f"error in job {job.job.num} ({job.job.override_dirname}): {sentence}\nThe other jobs go on; tables of "
            f"those that end: python -m povid.report {folder.parent}",
            file=sys.stderr,
        )
        raise


def told(error: BaseException) -> str | None:
    """The sentence of the Fault behind an error, if there is one."""
    from povid.fault import Fault

    while error is not None:
        if isinstance(error, Fault):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def start() -> int:
    """The exit status: 0, 2 for what the user can mend, 143 for a run that was told to stop."""
    from povid.fault import Fault
    from povid.run.resume import expand

    try:
        if "resume=latest" in sys.argv:
            sys.argv[1:] = expand(sys.argv[1:])
            print("resume=latest:", *sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if begun:
            raise
        print("error:", *(line.strip() for line in str(error).splitlines() if line.strip()), file=sys.stderr)
        return 2
    except OSError as error:
        if begun:
            raise
        print(
            f"error: {error.filename}: {error.strerror}; choose another folder with outputs= or hydra.run.dir=",
            file=sys.stderr,
        )
        return 2
    except Fault as fault:  # of a job, whose sentence has been printed, or of resume=latest
        if "resume=latest" in sys.argv:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(start())
