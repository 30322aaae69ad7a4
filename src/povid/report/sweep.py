"""Hydra callback that makes the tables when a sweep ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class TableAfterSweep(Callback):
    """Write the tables of a sweep's folder and print Table 3.

    Hydra calls this in the parent process, and not at all if a job failed; ``python -m povid.report FOLDER`` makes the
    same tables at any time.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from povid.fault import Fault
        from povid.report.command import write_tables

        folder = Path(config.hydra.sweep.dir)
        try:
            files = write_tables(folder)
        except Fault as fault:
            print(f"No tables were made: {fault}")
            return
        for file in files:
            if file.name == "table3.txt":
                print(f"\n{file.read_text(encoding='utf-8')}")
        print("written:", *files, sep="\n  ")
