"""``python -m povid.dispreference input=... images=... out=...``: dispreferred answers in POVID's JSON format."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from povid.dispreference import cooccurrence
from povid.dispreference.gates import Gates
from povid.dispreference.generate import (
    Sampling,
    claimed,
    estimate,
    folder_of,
    generate,
    identity,
    settings_of,
)
from povid.dispreference.report import figures, summary, write_report
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault, validated
from povid.machine import conf_folder
from povid.preferences.formats import write_povid
from povid.server.endpoint import Endpoint, EndpointSettings

CONF = conf_folder()


def run(config: DictConfig) -> None:
    """Read the rows, write ``config.out`` and the report beside it.

    Raises:
        Fault: whatever a user can mend; replies that were paid for stay on disk.
    """
    for key in ("input", "images", "out"):
        if not config[key]:
            raise Fault(f"{key} is not set; give input=FILE images=FOLDER out=FILE.json")
    out = Path(config.out)
    if config.dispreference not in ("endpoint", "cooccurrence"):
        raise Fault(f"dispreference={config.dispreference} does not exist; choose endpoint or cooccurrence")
    if out.suffix != ".json":
        raise Fault(f"out={out} must end in .json, since POVID's format is one JSON list")
    skipped: list[str] | None = [] if config.skip_bad else None
    if config.limit is not None and (not isinstance(config.limit, int) or config.limit < 1):
        raise Fault(f"limit={config.limit} takes no record; give a whole number of at least 1, or null for all")
    rows = read_rows(Path(config.input), Path(config.images), kind=config.prompt, rounds=config.rounds, skipped=skipped)
    rows = rows[: config.limit]
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    if config.dispreference == "cooccurrence":
        _locally(config, rows, out)
    else:
        _by_endpoint(config, rows, out)


def _by_endpoint(config: DictConfig, rows: list[Row], out: Path) -> None:
    sampling = Sampling(**OmegaConf.to_container(config.sampling))
    gates = Gates(**OmegaConf.to_container(config.gates))
    if not config.endpoint.model:
        raise Fault("endpoint.model is not set; name a vision model as the server knows it")
    with claimed(out, identity(rows, **settings_of(sampling, gates, config.endpoint.model))) as folder:
        settings = validated(EndpointSettings, OmegaConf.to_container(config.endpoint, resolve=True), "endpoint")
        endpoint = Endpoint(settings, folder / "replies.jsonl")
        print(estimate(rows, endpoint, sampling), file=sys.stderr, flush=True)
        if config.estimate_only:
            return
        result = generate(rows, endpoint, sampling, gates, give_up=config.give_up)
        numbers = figures(result.triples, result.kinds, result.rejects, result.reasons)
        numbers |= {
            "replies": result.replies,
            "tokens": result.tokens,
            "cost": result.cost,
            "model": config.endpoint.model,
        }
        write_report(folder, f"Dispreferences: {out.name}", result.triples, numbers, result.rejects)
        _finish(config, out, result.triples, numbers)


def _locally(config: DictConfig, rows: list[Row], out: Path) -> None:
    if not config.objects:
        raise Fault("objects is not set; give COCO's instances JSON or an objects.json (objects=FILE)")
    known = cooccurrence.read_objects(Path(config.objects))
    learned = cooccurrence.learn(known, [row.answer for row in rows])
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    about = {"objects": digest, "seed": config.seed}
    with claimed(out, identity(rows, **about)) as folder:
        triples, kinds, rejects = cooccurrence.rewrite(rows, learned, config.seed)
        numbers = figures(triples, kinds, rejects, {})
        write_report(folder, f"Dispreferences: {out.name}", triples, numbers, rejects)
        _finish(config, out, triples, numbers)


def _finish(config: DictConfig, out: Path, triples: list, numbers: dict) -> None:
    print(summary(numbers))
    if not triples:
        raise Fault(f"no record could be used, so {out} was not written; see {folder_of(out)}/rejects.jsonl")
    write_povid(triples, out, Path(config.images))
    print(f"{out}\n{folder_of(out)}/report.html")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="dispreference")
def main(config: DictConfig) -> None:
    """Run and turn a Fault into one sentence and status 2."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(config)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: stopped; all replies are kept, start again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
