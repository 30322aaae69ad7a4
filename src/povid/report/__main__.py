"""``python -m povid.report OUTPUTS``: the paper's tables with our rows beside the printed ones.

``python -m povid.report dashboard OUTPUTS`` makes a Weights & Biases workspace of the runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from povid.fault import Fault
from povid.report import workspace
from povid.report.command import write_tables


def main(arguments: list[str] | None = None) -> int:
    """Write the tables and print them with the paths of all files. Returns the exit status: 0, or 2 after an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from povid.report import compare  # only here: tables need no scipy

        return compare.main(arguments[1:])
    if arguments[:1] == ["dashboard"]:
        try:
            print(workspace.main(arguments[1:]))
        except Fault as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 2
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m povid.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="To compare two runs answer by answer: python -m povid.report compare RUN_A RUN_B",
    )
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="folder with run folders, at any depth")
    parser.add_argument(
        "--table",
        type=int,
        choices=(1, 2, 3, 4),
        action="append",
        help="only this table; repeatable (default: all tables that runs belong to)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: OUTPUTS/tables)")
    parser.add_argument("--no-pictures", action="store_true", help="skip the PNG files")
    options = parser.parse_args(arguments)
    try:
        files = write_tables(options.outputs, options.out, tuple(options.table or ()), not options.no_pictures)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    for file in files:
        if file.suffix == ".txt":
            print(file.read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
