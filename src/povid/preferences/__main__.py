"""``python -m povid.preferences check | show | convert DATA``: look at preference data before training on them.

``python -m povid.preferences fetch NAME``: download a published data set.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from povid.fault import Fault, did_you_mean, sentences, validated
from povid.machine import conf_folder, environment
from povid.preferences.check import check
from povid.preferences.formats import find, names
from povid.preferences.show import NOISE_STEPS, write_page
from povid.preferences.triple import Triple

if TYPE_CHECKING:
    from povid.method.distortions import Distortion


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after an error, when ``check`` finds a problem and ``fetch`` something missing; 130
    when it is interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("stopped; started again, a download goes on where it was", file=sys.stderr)
        return 130
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

    one = commands.add_parser(
        "fetch",
        help="download a published data set, and the pictures that its records name",
        epilog="Everything is checked and recorded in fetched.json; started again, a download goes on where it was.",
    )
    one.add_argument("name", metavar="NAME", help=f"a data set of conf/data: {', '.join(_published(conf_folder()))}")
    one.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("POVID_DATA") or "data"),
        metavar="DIR",
        help="folder of all data (default: $POVID_DATA, or data)",
    )
    one.add_argument(
        "--pictures",
        choices=("named", "all", "none"),
        default="named",
        help="where they are apart: those that the records name (default), the whole archive, or none",
    )
    one.add_argument("--revision", metavar="COMMIT", help="in place of the one that conf/data or fetched.json names")
    one.add_argument("--files", nargs="+", metavar="PATTERN", help="only these files, for example a few of many shards")
    one.add_argument("--config-dir", type=Path, metavar="DIR", help="further configurations, as for train.py")
    one.set_defaults(run=_fetch)
    return parser


def _published(conf: Path) -> list[str]:
    """The data sets of a configuration folder that name their source."""
    return [file.stem for file in sorted((conf / "data").glob("*.yaml")) if "\nsource:" in file.read_text("utf-8")]


def _fetch(options: argparse.Namespace) -> int:
    from povid.preferences import fetch  # only here: no other command needs the network

    data = _composed(options.name, options.data, options.config_dir)
    if data.get("source") is None:
        raise Fault(f"{options.name} names no source to download from; see conf/data/{options.name}.yaml")
    source = validated(fetch.DataSource, data["source"], f"data.source of {options.name}")
    if not data.get("root"):
        raise Fault(f"{options.name} has no data.root, the folder that its files belong into; give it one in its YAML")
    images, arguments = Path(data["images"]), {k: v for k, v in data["format"].items() if not k.startswith("_")}
    reader = partial(find(data["format"]["_target_"]), **arguments)
    whole = fetch.fetch(
        options.name,
        source,
        Path(data["root"]),
        images,
        lambda skipped: reader(Path(data["preferences"]), images, skipped),
        pictures=options.pictures,
        revision=options.revision,
        files=options.files,
    )
    elsewhere = f"POVID_DATA={options.data} " if options.data != Path(os.environ.get("POVID_DATA") or "data") else ""
    if whole:
        print(f"train on it: {elsewhere}python train.py data={options.name}")
    return 0 if whole else 2


def _composed(name: str, folder: Path, more: Path | None) -> dict[str, Any]:
    """The settings ``data`` of a run with data=NAME and POVID_DATA=FOLDER."""
    from hydra import compose, initialize_config_dir  # only here: no other command needs a configuration
    from omegaconf import OmegaConf

    folders = [conf_folder(), *([more.resolve()] if more else [])]
    options = sorted({file.stem for conf in folders for file in (conf / "data").glob("*.yaml")} - {"_base"})
    if name not in options:
        if (conf_folder() / "benchmarks" / f"{name}.yaml").is_file():
            raise Fault(f"{name} is not preference data; run python -m povid.benchmarks fetch {name}")
        raise Fault(f"there is no data set {name!r}{did_you_mean(name, options, 'data sets')}")
    more_folders = [f"hydra.searchpath=[file://{more.resolve()}]"] if more else []
    with environment("POVID_DATA", str(folder)), initialize_config_dir(str(conf_folder()), version_base="1.3"):
        data = compose(overrides=[f"+data={name}", *more_folders]).data
        if data.get("source") is None:
            return {}
        found: Any = OmegaConf.to_container(data, resolve=True)
    return found


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
