"""``python -m povid.scenes``: write the embedded world, or train its base model."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from povid.fault import Fault
from povid.scenes.world import prepare


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after an error."""
    parser = argparse.ArgumentParser("python -m povid.scenes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    settings = commands.add_parser("prepare", help="write preferences, pictures, CHAIR and POPE files to a folder")
    settings.add_argument("folder", type=Path, help="written unless it is complete")
    for name, parameter in inspect.signature(prepare).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kind = float if parameter.default is None else type(parameter.default)
            settings.add_argument(
                "--" + name.replace("_", "-"), type=kind, default=parameter.default, help="default %(default)s"
            )
    build = commands.add_parser(
        "build",
        help="train the base model (about 15 minutes on two cores), measure it and "
        "print its figures and those of the shipped one",
    )
    build.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("outputs/base"),
        help="where the model is written; default %(default)s",
    )
    build.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    try:
        if given.pop("command") == "prepare":
            print(prepare(given.pop("folder"), **given))
        else:
            from povid.scenes import build as making  # imports torch, which prepare does not need

            making.build(given["folder"], given["seed"])
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
