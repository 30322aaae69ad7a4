"""Hydra callback that makes the tables and the page when a sweep ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class TableAfterSweep(Callback):
    """Write the tables and the page of a sweep's folder; print Table 3 and the page's address.

    Hydra calls this in the parent process, and not at all if a job failed; ``python -m povid.report FOLDER`` and
    ``python -m povid.report page FOLDER`` make the same at any time.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from povid.fault import Fault
        from povid.report.command import write_tables
        from povid.report.page import write_page

        folder = Path(config.hydra.sweep.dir)
        try:
            files = write_tables(folder)
            page = write_page(folder)
        except Fault as fault:
            print(f"The tables and the page are not complete: {fault}")
            return
        print("written:", *files, sep="\n  ")
        for file in files:
            if file.name == "table3.txt":
                print(f"\n{file.read_text(encoding='utf-8')}")
        print(f"page: {page.resolve().as_uri()}")
