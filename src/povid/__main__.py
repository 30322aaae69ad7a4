"""``povid COMMAND ...``, or ``python -m povid COMMAND ...``: every command of the project under one name."""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

COMMANDS = {  # each can also be run as python -m MODULE
    "train": ("povid.run", "train and evaluate: what train.py does, with the same overrides"),
    "report": ("povid.report", "write the tables and figures of all runs below a folder"),
    "analysis": ("povid.analysis", "look into trained models, as Figures 1, 4 and 5 do"),
    "benchmarks": ("povid.benchmarks", "score anybody's answers, or fetch a benchmark's files"),
    "preferences": ("povid.preferences", "fetch, check, show or convert preference data"),
    "dispreference": ("povid.dispreference", "generate dispreferred responses"),
    "adapters": ("povid.adapters", "publish, combine or merge adapters, or convert the authors' checkpoints"),
    "scenes": ("povid.scenes", "write the embedded world, or train its base model again"),
    "arena": ("povid.arena", "compare methods at settings that one rule chose for each of them"),
    "bench": ("povid.bench", "measure what a training step costs"),
}
WIDTH = max(map(len, COMMANDS))
USAGE = "usage: povid COMMAND ...\n\n" + "\n".join(f"  {name:{WIDTH}}  {text}" for name, (_, text) in COMMANDS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command exactly as ``python -m MODULE`` would, so that processes it launches start the same way.

    Returns:
        0 after the help text; 2 without a command or with an unknown one. A command itself ends by ``SystemExit``
        with its own status.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problem = f"{name} is not a command of povid{hint}" if name else "no command given"
        print(f"error: {problem}\n\n{USAGE}", file=sys.stderr)
        return 2
    sys.argv[1:] = rest
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
