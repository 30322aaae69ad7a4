"""``python -m povid.analysis NAME ...``: look into trained models, as Figures 1, 4 and 5 of the paper do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from povid.analysis import analyses
from povid.fault import Fault


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one analysis and print the files that it wrote. Returns the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m povid.analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, module in analyses().items():
        about = module.__doc__.split("\n")[0]
        one = commands.add_parser(name, help=about, description=about)
        module.arguments(one)
        one.set_defaults(measure=module.measure)
    options = parser.parse_args(arguments)
    try:
        written = options.measure(options)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or options.out}: {error.strerror or error}; choose another --out", file=sys.stderr
        )
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
