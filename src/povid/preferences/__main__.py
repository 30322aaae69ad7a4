"""``python -m povid.preferences check | show | convert DATA``: look at preference data before training on them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from povid.fault import Fault, did_you_mean, sentences
from povid.machine import conf_folder
from povid.preferences.check import check
from povid.preferences.formats import find, names
from povid.preferences.show import NOISE_STEPS, write_page
from povid.preferences.triple import Triple

if TYPE_CHECKING:
    from povid.method.distortions import Distortion


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
        "data",
        type=Path,
        metavar="DATA",
        help="a .json, .jsonl, .csv or .parquet file, a folder of parquet shards, or hf://datasets/OWNER/NAME",
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
    one.add_argument(
        "--noise",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="an option of conf/noise and its settings, in place of the noised pictures; may be given several times",
    )
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
    distortions = {" ".join(words): _distortion(*words) for words in options.noise}
    write_page(
        triples,
        options.out,
        title=str(options.data),
        count=options.count,
        seed=options.seed,
        noise_steps=() if distortions else NOISE_STEPS,
        distortions=distortions,
    )
    print(options.out)
    return 0


def _distortion(name: str, *settings: str) -> Distortion:
    """An option of conf/noise, as a run with the overrides noise=NAME and noise.KEY=VALUE has it."""
    from hydra import compose, initialize_config_dir  # only here: no other command needs a configuration
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf.errors import OmegaConfBaseException

    given, options = " ".join((name, *settings)), [file.stem for file in (conf_folder() / "noise").glob("*.yaml")]
    if name not in options:
        raise Fault(f"--noise {given}: there is no such option{did_you_mean(name, sorted(options), 'options')}")
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            composed = compose(overrides=[f"+noise={name}", *(f"noise.{setting}" for setting in settings)])
        return instantiate(composed.noise)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValidationError):
            raise Fault(f"--noise {given}: {'; '.join(sentences(cause.errors(), '', BaseModel))}") from None
        raise Fault(f"--noise {given}: {str(cause).splitlines()[0]}; correct the setting") from None


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
