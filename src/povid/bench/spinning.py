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
    *(sys.executable, "-m", "povid.run", "ablation=text", "benchmarks=[]", "samples=0", "logger=none", "stage=1"),
    *("reference_cache=false", "stages.1.epochs=1000", "checkpoint.every_minutes=null"),
)
WARMUPS = 5  # steps that are not counted


def train(folder: Path, steps: int, spins: str, threads: int) -> subprocess.Popen:
    """Start to train; the data are made, and the metrics written, in ``folder``."""
    environment = os.environ | {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": str(threads)}
    command = [*COMMAND, f"stages.1.max_steps={steps}", f"outputs={folder}", f"hydra.run.dir={folder}/run"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def speed(folder: Path) -> float:
    """Records a second, the median over the steps after the first few."""
    with (folder / "run" / "stage_1" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [float(row["examples_per_second"]) for row in csv.DictReader(file) if row.get("examples_per_second")]
    return statistics.median(rows[WARMUPS:] or rows)


def measured(others: int, steps: int, spins: str, threads: int) -> float:
    """The speed beside ``others`` that train without end.

    Raises:
        Fault: training failed.
    """
    with tempfile.TemporaryDirectory(prefix="povid-spinning-") as place:
        folders = [Path(place) / str(number) for number in range(others + 1)]
        for folder in folders:
            folder.mkdir()
        beside = [train(folder, 10**6, spins, threads) for folder in folders[1:]]
        try:
            if train(folders[0], steps, spins, threads).wait():
                raise Fault(f"training failed: {(folders[0] / 'log').read_text(encoding='utf-8').strip()[-300:]}")
            return speed(folders[0])
        finally:
            for process in beside:
                process.send_signal(signal.SIGKILL)
                process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m povid.bench.spinning", description=__doc__)
    parser.add_argument("--spins", nargs="+", default=["300000", "1000", "0"], help="300000 is libgomp's own")
    parser.add_argument("--others", nargs="+", type=int, default=[0, 2], help="processes beside the measured one")
    parser.add_argument("--threads", nargs="+", type=int, default=[cores(), 1])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    print(f"{'others':>6} {'threads':>7} {'GOMP_SPINCOUNT':>14} {'records a second':>16}")
    try:
        for others in options.others:
            for threads in options.threads:
                for spins in options.spins if threads > 1 else options.spins[:1]:  # one thread waits for nobody
                    found = measured(others, options.steps, spins, threads)
                    print(f"{others:6} {threads:7} {spins if threads > 1 else '-':>14} {found:16.2f}", flush=True)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
