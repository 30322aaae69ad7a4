"""``python -m povid.dispreference input=... images=... out=...``: dispreferred answers in POVID's JSON format."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from povid.dispreference.generate import claimed, folder_of, identity
from povid.dispreference.report import figures, summary, write_report
from povid.dispreference.rows import read_rows
from povid.fault import Fault, validated
from povid.machine import conf_folder
from povid.preferences.formats import povid


def run(config: DictConfig) -> None:
    """Read the rows, write ``config.out`` and the report beside it.

    Raises:
        Fault: whatever the user can correct; replies that were paid for stay on disk.
    """
    for key in ("input", "images", "out"):
        if not config[key]:
            raise Fault(f"{key} is not set; give input=FILE images=FOLDER out=FILE.json")
    out = Path(config.out)
    if out.suffix != ".json":
        raise Fault(f"out={out} must end in .json, since POVID's format is one JSON list")
    if config.limit is not None and (not isinstance(config.limit, int) or config.limit < 1):
        raise Fault(f"limit={config.limit} selects no record; give a whole number of at least 1, or null for all")
    generator = _generator(config)
    skipped: list[str] | None = [] if config.skip_bad else None
    rows = read_rows(Path(config.input), Path(config.images), kind=config.prompt, rounds=config.rounds, skipped=skipped)
    rows = rows[: config.limit]
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    with claimed(out, identity(rows, **generator.identity(config.seed))) as folder:
        made = generator.generate(rows, folder, config.seed)
        if made is None:
            return
        numbers = figures(made.triples, made.kinds, made.rejects, made.reasons) | made.figures
        write_report(folder, f"Dispreferences: {out.name}", made.triples, numbers, made.rejects)
        print(summary(numbers))
        if not made.triples:
            raise Fault(f"no record could be used, so {out} was not written; see {folder_of(out)}/rejects.jsonl")
        povid.write(made.triples, out, Path(config.images))
        print(f"{out}\n{folder_of(out)}/report.html")


def _generator(config: DictConfig) -> Any:
    """The object that ``dispreference`` names, its settings checked."""
    settings: Any = OmegaConf.to_container(config.dispreference, resolve=True)
    return validated(hydra.utils.get_class(settings.pop("_target_")), settings)


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="dispreference")
def main(config: DictConfig) -> None:
    """Run; an error is one sentence and exit status 2."""
    for client in ("httpx", "httpx2"):  # of openai 2 and 3
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        run(config)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = error.filename or config.out
        print(f"error: {place}: {error.strerror or error}; free space or choose another out", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; all replies are kept, start again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
