"""``python -m povid.preferences check | show | convert DATA``: look at preference data before training on them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from povid.fault import Fault
from povid.preferences.check import check
from povid.preferences.formats import find, names
from povid.preferences.show import write_page
from povid.preferences.triple import Triple


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after an error, and when ``check`` finds a problem."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
    except OSError as error:
        place = error.filename or getattr(options, "out", options.data)
        print(f"error: {place}: {error.strerror or error}; free space or choose another place", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m povid.preferences", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "data", type=Path, metavar="DATA", help="a .json, .jsonl, .csv or .parquet file, or a folder of parquet shards"
    )
    common.add_argument(
        "--format", default="povid", help=f"{', '.join(names())}, or the dotted path of your own (default: povid)"
    )
    common.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (default: that of DATA)")

    one = commands.add_parser("check", parents=[common], help="list every record that would stop a run")
    one.add_argument("--sample", type=int, metavar="N", help="check N records drawn at random")
    one.set_defaults(run=_check)

    one = commands.add_parser("show", parents=[common], help="write a page to look at triples")
    one.add_argument("--out", type=Path, default=Path("preferences.html"), metavar="PAGE")
    one.add_argument("--count", type=int, default=40, metavar="N", help="triples on the page, drawn at random")
    one.add_argument("--seed", type=int, default=0, help="of the draw and of the noise (default: 0)")
    one.add_argument("--skip-bad", action="store_true", help="skip and count records that cannot be read")
    one.set_defaults(run=_show)

    one = commands.add_parser("convert", parents=[common], help="write the data in another format")
    one.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"{', '.join(names('write'))}, or the dotted path of your own"
    )
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json for povid, .parquet for trl")
    one.add_argument("--skip-bad", action="store_true", help="skip and count records that cannot be read")
    one.set_defaults(run=_convert)
    return parser


def _images(options: argparse.Namespace) -> Path:
    return options.images or (options.data if options.data.is_dir() else options.data.parent)


def _read(options: argparse.Namespace) -> list[Triple]:
    skipped: list[str] | None = [] if options.skip_bad else None
    triples = find(options.format)(options.data, _images(options), skipped)
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    if skipped:
        print(f"records skipped: {len(skipped)}", file=sys.stderr)
    if not triples:
        raise Fault(f"{options.data} holds no usable record; check --format and --images")
    return triples


def _check(options: argparse.Namespace) -> int:
    skipped: list[str] = []
    triples = find(options.format)(options.data, _images(options), skipped)
    report = check(triples, sample=options.sample, skipped=skipped)
    print("\n".join(report.lines()))
    return 0 if report.sound else 2


def _show(options: argparse.Namespace) -> int:
    triples = _read(options)
    write_page(triples, options.out, title=str(options.data), count=options.count, seed=options.seed)
    print(options.out)
    return 0


def _convert(options: argparse.Namespace) -> int:
    write = find(options.to, "write")
    if options.out.exists():
        raise Fault(f"{options.out} exists; remove it or give another --out")
    triples = _read(options)
    write(triples, options.out, _images(options))
    print(f"records in {options.out}: {len(triples)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
