"""The one door: Hydra composes a configuration, povid.experiment runs it.

    python train.py                                    all stages of ablation=both on the embedded world
    python train.py stage=1
    python train.py -m ablation=none,text,noise,both   Table 3
    python train.py --cfg job                          what a command line amounts to
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
os.environ.setdefault("HYDRA_FULL_ERROR", "1")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    from povid.experiment import run

    run(cfg, Path(HydraConfig.get().runtime.output_dir))


def told(error: BaseException) -> str | None:
    """The sentence of the Fault behind an error, if there is one."""
    from povid.fault import Fault

    while error is not None:
        if isinstance(error, Fault):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sentence = told(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
