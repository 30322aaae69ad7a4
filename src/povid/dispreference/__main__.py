"""``python -m povid.dispreference input=... images=... out=...``: dispreferred answers in POVID's JSON format."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from povid.dispreference.generate import claimed, folder_of, identity
from povid.dispreference.report import figures, summary, write_report
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault
from povid.files import write_bytes
from povid.machine import conf_folder
from povid.preferences.formats import povid
from povid.run.build import build
from povid.run.quiet import quiet
from povid.terminal import Lines


def run(config: DictConfig) -> None:
    """Read the rows, write ``config.out`` and the report beside it.

    Raises:
        Fault: whatever the user can correct; replies that were paid for stay on disk.
    """
    if config.rounds in ("first", "each"):
        raise Fault(f"rounds={config.rounds} is now spelled questions={config.rounds}")
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
    rows = read_rows(
        Path(config.input),
        Path(config.images),
        kind=config.prompt,
        questions=config.questions,
        answered=getattr(generator, "needs_answers", True),
        skipped=skipped,
    )
    rows = rows[: config.limit]
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    if config.rounds is None:
        if write(generator, out, rows, Path(config.images), config.seed):
            print(f"{out}\n{folder_of(out)}/report.html")
    else:
        _rounds(config, generator, out, rows)


def write(generator: Any, out: Path, rows: Sequence[Row], images: Path, seed: int) -> bool:
    """Write a generator's pairs to ``out`` and the report beside it; false if only an estimate was wanted."""
    with claimed(out, identity(rows, **generator.identity(rows, seed))) as folder:
        made = generator.generate(rows, folder, seed)
        if made is None:
            return False
        numbers = figures(made.triples, made.kinds, made.rejects, made.reasons) | made.figures
        write_report(folder, f"Dispreferences: {out.name}", made.triples, numbers, made.rejects)
        print(summary(numbers), flush=True)
        if not made.triples:
            raise Fault(f"no record could be used, so {out} was not written; see {folder_of(out)}/rejects.jsonl")
        povid.write(made.triples, out, images)
    return True


def _rounds(config: DictConfig, generator: Any, out: Path, rows: Sequence[Row]) -> None:
    """Sample and train ``config.rounds`` times; ``out`` receives the pairs of the last round."""
    from povid.dispreference import rounds  # with all that training needs

    if not isinstance(config.rounds, int) or isinstance(config.rounds, bool) or config.rounds < 1:
        raise Fault(f"rounds={config.rounds}: give a whole number of at least 1, or null to write pairs only")
    further, images = str(config.train or ""), Path(config.images)
    rounds.overrides(further)
    train = functools.partial(
        rounds.training, name=generator.name, images=images, common=_shared(config), further=further
    )
    whole = generator.identity(rows, config.seed) | {"rounds": config.rounds, "train": further}
    with claimed(out, identity(rows, **whole)) as folder:
        adapters = rounds.repeat(
            generator,
            config.rounds,
            folder,
            functools.partial(write, rows=rows, images=images, seed=config.seed),
            train,
        )
        if adapters is not None:
            write_bytes(out, (folder / f"round_{config.rounds}" / "pairs.json").read_bytes())
            print(f"{out}\nthe last policy: adapters=[{','.join(map(str, adapters))}]")


def _shared(config: DictConfig) -> list[str]:
    """The arguments of this command that train.py takes too: the model, and where configurations are found."""
    from povid.dispreference import rounds
    from povid.run.resume import config_dirs

    job: Any = HydraConfig.get()
    given = [argument for argument in job.overrides.task if argument.lstrip("+~").startswith("model.")]
    places = [f"--config-dir={place}" for place in config_dirs(job)]
    return [*places, f"model={job.runtime.choices['model']}", f"outputs={rounds.quoted(config.outputs)}", *given]


def _generator(config: DictConfig) -> Any:
    """The object that ``dispreference`` names, its settings checked."""
    settings: Any = OmegaConf.to_container(config.dispreference, resolve=True)
    problems: list[str] = []
    made = build(settings, "dispreference", problems)
    if problems:
        raise Fault("; ".join(problem.removeprefix("dispreference.") for problem in problems))
    return made


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="dispreference")
def main(config: DictConfig) -> None:
    """Run; an error is one sentence and exit status 2."""
    quiet()
    for name in ("povid.benchmarks", "povid.dispreference"):  # how far sampling and judging are
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("povid").addHandler(Lines())
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
        print("error: interrupted; what has arrived is kept, start again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
