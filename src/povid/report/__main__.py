"""``python -m povid.report OUTPUTS``: the paper's tables with our rows beside the printed ones, and figures.

``python -m povid.report page OUTPUTS``: all of it on one page, with curves, samples and configurations.
``python -m povid.report compare RUN_A RUN_B``: two runs, answer by answer.
``python -m povid.report dashboard OUTPUTS``: a Weights & Biases workspace of the runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from povid.fault import Fault
from povid.report.command import write_tables


def main(arguments: list[str] | None = None) -> int:
    """Write tables or a page and print where they are. Returns the exit status: 0, or 2 after an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    others = {"page": _page, "compare": _compare, "dashboard": _dashboard}
    try:
        if arguments and arguments[0] in others:
            return others[arguments[0]](arguments[1:])
        return _tables(arguments)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def _tables(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m povid.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    files = write_tables(options.outputs, options.out, tuple(options.table or ()), not options.no_pictures)
    for file in files:
        if file.suffix == ".txt":
            print(file.read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return 0


def _page(arguments: list[str]) -> int:
    from povid.report.page import write_page

    parser = argparse.ArgumentParser(prog="python -m povid.report page", description="write the page of all runs")
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="folder with run folders, at any depth")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: OUTPUTS/report.html)")
    options = parser.parse_args(arguments)
    print(write_page(options.outputs, options.out).resolve().as_uri())
    return 0


def _compare(arguments: list[str]) -> int:
    from povid.report import compare  # tables need no scipy

    return compare.main(arguments)


def _dashboard(arguments: list[str]) -> int:
    from povid.report import workspace

    print(workspace.main(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
