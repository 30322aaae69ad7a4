"""``python -m povid.preferences check | show | convert DATA``: look at preference data before training on it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from povid.fault import Fault
from povid.preferences.check import check
from povid.preferences.formats import READERS, read, write_povid, write_trl
from povid.preferences.show import write_page


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one sentence about what the user can mend (check: when there are faults)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m povid.preferences", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "data", type=Path, metavar="DATA", help="a .json, .jsonl or .parquet file, or a folder of shards"
    )
    common.add_argument("--format", default="povid", help=f"one of {', '.join(READERS)} (default: povid)")
    common.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (default: that of DATA)")

    one = commands.add_parser("check", parents=[common], help="list every record that would stop a run")
    one.add_argument("--sample", type=int, metavar="N", help="look at N records drawn at random")
    one.set_defaults(run=_check)

    one = commands.add_parser("show", parents=[common], help="write a page to look at triples")
    one.add_argument("--out", type=Path, default=Path("preferences.html"), metavar="PAGE")
    one.add_argument("--count", type=int, default=40, metavar="N", help="triples on the page, drawn at random")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and count them")
    one.set_defaults(run=_show)

    one = commands.add_parser("convert", parents=[common], help="write the data in another format")
    one.add_argument("--to", choices=("povid", "trl"), required=True)
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json for povid, .parquet for trl")
    one.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and count them")
    one.set_defaults(run=_convert)
    return parser


def _images(options: argparse.Namespace) -> Path:
    return options.images or (options.data if options.data.is_dir() else options.data.parent)


def _read(options: argparse.Namespace) -> list:
    skipped: list[str] | None = [] if options.skip_bad else None
    triples = read(options.format, options.data, _images(options), skipped)
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} records", file=sys.stderr)
    if not triples:
        raise Fault(f"{options.data} holds no record that can be used; check --format and --images")
    return triples


def _check(options: argparse.Namespace) -> int:
    skipped: list[str] = []
    triples = read(options.format, options.data, _images(options), skipped)
    report = check(triples, sample=options.sample, skipped=skipped)
    print("\n".join(report.lines()))
    return 0 if report.sound else 2


def _show(options: argparse.Namespace) -> int:
    triples = _read(options)
    write_page(triples, options.out, title=str(options.data), count=options.count, seed=options.seed)
    print(options.out)
    return 0


def _convert(options: argparse.Namespace) -> int:
    if options.out.exists():
        raise Fault(f"{options.out} exists; remove it or give another --out")
    triples = _read(options)
    if options.to == "trl":
        write_trl(triples, options.out)
    else:
        write_povid(triples, options.out, _images(options))
    print(f"{len(triples)} records in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
