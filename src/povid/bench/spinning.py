"""``python -m povid.bench.spinning``: how long threads should spin, on a machine of one's own and on a shared one.

Trains the embedded world for a few steps by the ordinary path, once for each value of GOMP_SPINCOUNT, alone and beside
other processes that do the same, and prints the records trained a second.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from povid.fault import Fault
from povid.machine import cores

COMMAND = (
    *(sys.executable, "-m", "povid.run", "ablation=text", "stage=1", "stages.1.epochs=1000", "reference_cache=false"),
    *("benchmarks=[]", "samples=0", "checkpoint.every_minutes=null", "logger=none"),
)
WARMUPS = 5  # steps that are not counted


class Trainer:
    """Starts to train, each time with another seed, so that nothing is taken over from before. The data are made once.

    Args:
        folder: of data and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, 0

    def start(self, steps: int, spins: str, threads: int) -> tuple[subprocess.Popen, Path]:
        """The process, and the folder of its run."""
        self.seed += 1
        run = self.folder / str(self.seed)
        logger = f"+logger.speed={{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: {run}, name: speed}}"
        own = [f"seed={self.seed}", f"stages.1.max_steps={steps}", f"outputs={self.folder}", f"hydra.run.dir={run}"]
        environment = os.environ | {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": str(threads)}
        with run.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen([*COMMAND, *own, logger], env=environment, stdout=log, stderr=subprocess.STDOUT)
        return process, run

    def speed(self, steps: int, spins: str, threads: int) -> float:
        """Records a second, the median over the steps after the first few.

        Raises:
            Fault: training failed.
        """
        process, run = self.start(steps, spins, threads)
        try:
            failed = process.wait()
        finally:
            process.kill()  # where this process is stopped
        if failed:
            raise Fault(f"training failed: {run.with_suffix('.log').read_text(encoding='utf-8').strip()[-300:]}")
        rows: list[float] = []
        for file in run.glob("speed/*/metrics.csv"):  # that of the stage, and that of the run's scores
            with file.open(encoding="utf-8") as table:
                rows += [
                    float(row["examples_per_second"]) for row in csv.DictReader(table) if row.get("examples_per_second")
                ]
        return statistics.median(rows[WARMUPS:] or rows)

    def speed_beside(self, others: int, steps: int, spins: str, threads: int) -> float:
        """The speed beside ``others`` that train without end."""
        beside = [self.start(10**6, spins, threads)[0] for _ in range(others)]
        try:
            return self.speed(steps, spins, threads)
        finally:
            for process in beside:
                process.kill()
                process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m povid.bench.spinning", description=__doc__)
    parser.add_argument("--spins", nargs="+", default=["300000", "1000", "0"], help="300000 is libgomp's own")
    parser.add_argument("--others", nargs="+", type=int, default=[0, 2], help="processes beside the measured one")
    parser.add_argument("--threads", nargs="+", type=int, default=[cores(), 1])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the processes that it started would go on
    print(f"{'others':>6} {'threads':>7} {'GOMP_SPINCOUNT':>14} {'records a second':>16}")
    try:
        with tempfile.TemporaryDirectory(prefix="povid-spinning-") as folder:
            trainer = Trainer(Path(folder))
            trainer.speed(1, options.spins[0], 1)  # makes the data
            for others in options.others:
                for threads in options.threads:
                    for spins in options.spins if threads > 1 else options.spins[:1]:  # one thread waits for nobody
                        found = trainer.speed_beside(others, options.steps, spins, threads)
                        print(f"{others:6} {threads:7} {spins if threads > 1 else '-':>14} {found:16.2f}", flush=True)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
