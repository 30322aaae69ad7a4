"""``python -m povid.arena``: compare methods at settings that one rule chose for each of them.

Every arm of the plan (conf/arena.yaml) tries the same settings on the tuning pictures, runs with the chosen one in
several worlds and with several seeds, and stands in one table and one figure. Running it again does what is not done.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from povid.arena import pool, show
from povid.arena.plan import Job, choose, contests, read_plan, trials
from povid.arena.result import standings
from povid.fault import Fault
from povid.files import write_json
from povid.machine import conf_folder, cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arena and print its files. Returns 0, 2 after an error, 130 or 143 where a signal stopped it."""
    parser = argparse.ArgumentParser(
        prog="python -m povid.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, nargs="?", help="a YAML file (default: conf/arena.yaml)")
    parser.add_argument("--out", type=Path, default=Path("outputs/arena"), metavar="DIR", help="default: outputs/arena")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: one for each core)")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configurations, as for train.py")
    parser.add_argument("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: 2000)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if options.resamples < 100:
            raise Fault(f"--resamples is {options.resamples}; an interval needs at least 100")
        if options.jobs is not None and options.jobs < 1:
            raise Fault(f"--jobs is {options.jobs}; at least one run has to go on")
        _arena(options)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one left off", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(*_: object) -> None:
    print("stopped; the same command continues where this one left off", file=sys.stderr)
    sys.exit(143)


def _arena(options: argparse.Namespace) -> None:
    plan = read_plan(options.plan or conf_folder() / "arena.yaml")
    further = [] if options.config_dir is None else ["--config-dir", options.config_dir]
    tried = trials(plan, options.out)
    jobs = [job for arm in tried.values() for job in arm]
    if not _run("tuning", jobs, options, further):
        return
    chosen, tuned = choose(plan, tried)
    write_json(options.out / "chosen.json", tuned)
    for arm, one in tuned["arms"].items():
        print(f"  {arm}: {one['chosen']}")
    met = contests(plan, options.out, chosen)
    jobs = [job for arm in met.values() for job in arm]
    if not _run("evaluation", jobs, options, further):
        return
    print("counting ...", flush=True)
    files = show.write(plan, standings(plan, met, chosen, options.resamples), tuned, options.out, options.resamples)
    print((options.out / "arena.md").read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))


def _run(phase: str, jobs: Sequence[Job], options: argparse.Namespace, further: Sequence[str]) -> bool:
    """Whether all jobs are done now; with ``--dry-run`` those that are not are printed."""
    waiting = [job for job in jobs if not job.done]
    print(f"{phase}: {len(jobs)} runs, {len(jobs) - len(waiting)} of them done", flush=True)
    if options.dry_run:
        for job in waiting:
            print(" ".join(pool.command(job, options.out, further)))
        return not waiting
    pool.run(jobs, options.out, options.jobs or cores(), lambda line: print(line, flush=True), further)
    return True


if __name__ == "__main__":
    sys.exit(main())
