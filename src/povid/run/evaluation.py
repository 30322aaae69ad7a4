"""After the stages: benchmarks, captions before and after training, results.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from povid import files
from povid.benchmarks import suite
from povid.benchmarks.chair_words import objects, read_synonyms
from povid.benchmarks.processes import ALONE, Processes
from povid.fault import Fault, did_you_mean
from povid.machine import versions
from povid.method.distortions import distort_picture, generator
from povid.model.question import Answerer, Decoding, Question
from povid.preferences.pictures import Pictures, open_picture, side_by_side
from povid.preferences.triple import Triple
from povid.report import dashboards
from povid.report import samples as kept_samples
from povid.report.runs import is_number, lookup
from povid.run.answering import answerer
from povid.run.build import make
from povid.run.content import names, of_run
from povid.run.context import RunContext
from povid.run.identity import Identity, flat
from povid.run.loggers import close, make_loggers, show_results
from povid.run.samples import flipped, noise_responses
from povid.run.settings import Settings
from povid.run.wandb_run import WandbRun

log = logging.getLogger(__name__)

CAPTION = Decoding(max_new_tokens=96)


def judge(settings: Settings) -> Any:
    """The configured judge, or None."""
    return make(settings.judge) if settings.judge else None


def warn_of_missing(settings: Settings) -> None:
    """Warn about benchmarks that cannot be scored, before training starts."""
    for name, gap in suite.check(settings.benchmarks, judge(settings)).items():
        log.warning("%s will not be scored: %s (%s)", name, gap["missing"], gap["cure"])


def evaluate(
    settings: Settings,
    run: Path,
    triples: Sequence[Triple],
    adapters: Sequence[Path],
    stages: Mapping[str, Any],
    started: str,
    identity: Identity,
    processes: Processes = ALONE,
) -> tuple[dict[str, Any], list[str]]:
    """Answer the benchmarks and the samples with the adapted model, in all processes; the first one scores.

    ``identity`` is that of the answers. Returns the content of results.json, without timings, and the captions; nothing
    in a further process.

    Raises:
        Fault: a benchmark failed for a reason that running again can cure; the others' answers and scores are kept.
        ProcessFailed: another process failed.
    """
    batch = batch_that_counts(settings)
    with processes.together():
        answers = answerer(settings, adapters, processes, settings.engine)
    samples, model = sample_questions(triples, settings.plain.samples), f"povid-{identity.digest}"
    if processes.number:
        if suite.follow(settings.benchmarks, answers, run / "benchmarks", model, processes):
            caption(answers, samples, processes)
        return {}, []
    scores = suite.run(
        settings.benchmarks, answers, run / "benchmarks", judge(settings), model=model, processes=processes
    )
    if failed := [f"{name}: {score['missing']}" for name, score in scores.items() if score.get("open")]:
        raise Fault(
            f"{run} is not finished: {len(failed)} of {len(scores)} benchmarks failed. Stages, answers and the other "
            "scores are kept; resume it with resume=true (or latest) when the reason is gone:\n  - "
            + "\n  - ".join(failed)
        )
    captions = caption(answers, samples, processes)
    results = {
        "row": settings.plain.row,
        "ablation": settings.ablation.name,
        "stage": settings.plain.stage,
        "seed": settings.plain.seed,
        "objective": settings.objective,
        "noise": settings.tree["noise"],
        "model": settings.model.name,
        "data": settings.data.name,
        "dispreference": settings.dispreference_name,
        "experiment": settings.experiment,
        "settings": {
            "objective": {str(n): settings.objective_node(n) for n in settings.run_stages},
            "noise": settings.tree["noise"],
            "stages": {str(n): settings.stages[n].model_dump() for n in settings.run_stages},
        },
        "benchmarks": scores,
        "columns": suite.columns(settings.benchmarks),
        "decoding": {name: score["decoding"] | batch for name, score in scores.items() if "decoding" in score},
        "stages": dict(stages),
        "identity": of_run(identity, list(stages.values()), settings, run / "benchmarks").record()
        | {"named": names(settings)},
        "adapters": [str(adapter) for adapter in adapters],
        "versions": versions(),
        "started": started,
    }
    return results, captions


def optimized(results: Mapping[str, Any], names: str | list[str]) -> float | list[float]:
    """The value of ``optimized_metric`` in a run's results, or a list of values for a list of names.

    ``BENCHMARK.SCORE`` is a score of the evaluation; ``val/...`` and ``probe/...`` were measured while the last stage
    trained, of the adapter that was evaluated.

    Raises:
        Fault: the results do not hold it, or it is not a finite number.
    """
    if not isinstance(names, str):
        return [float(optimized(results, name)) for name in names]  # type: ignore[arg-type]
    benchmarks, stages = results["benchmarks"], list(results["stages"].values())
    measured = (stages[-1].get("measured") or {}) if stages else {}
    value = measured.get(names, lookup(benchmarks, names))
    if is_number(value):
        return float(value)
    missing = lookup(benchmarks, f"{names.partition('.')[0]}.missing")
    held = [*(path for path, score in flat(benchmarks) if is_number(score)), *measured]
    raise Fault(
        f"optimized_metric: the results do not hold {names!r}"
        + (f", since it was not scored: {missing}" if missing else did_you_mean(names, held, "scores"))
    )


def batch_that_counts(settings: Settings) -> dict[str, int]:
    """``generation.batch_size`` where answers depend on it, else nothing."""
    depends = getattr(settings.engine or settings.model, "answers_depend_on_batch", True)
    return {"batch_size": settings.generation.batch_size} if depends else {}


# --- captions --------------------------------------------------------------------------------------------------------


def sample_questions(triples: Sequence[Triple], count: int) -> list[Question]:
    """The first records with long answers, to be captioned before and after training."""
    order = sorted(range(len(triples)), key=lambda i: (len(triples[i].preferred[1].text) < 40, i))[:count]
    return [Question(triples[i].id, triples[i].image, triples[i].question, {"record": i}) for i in order]


def caption(answers: Answerer, samples: Sequence[Question], processes: Processes = ALONE) -> list[str]:
    return processes.ask(answers, samples, CAPTION) if samples else []


def write_captions_before(run: Path, answers: Answerer, samples: Sequence[Question], processes: Processes) -> None:
    """Caption the samples before the first stage, into a file, since a resumed run no longer has that policy."""
    file = run / "captions_before.json"
    if processes.exchange(not file.exists())[0]:
        captions = caption(answers, samples, processes)
        if processes.number == 0:
            files.write_json(file, captions)


def captions_before(run: Path) -> list[str]:
    file = run / "captions_before.json"
    cure = "move it away to leave out the captions before training"
    return files.read_json(file, list, cure) if file.exists() else []


def show(
    settings: Settings, run: Path, results: Mapping[str, Any], triples: Sequence[Triple], after: Sequence[str]
) -> None:
    """Keep the samples, write the page of captions, and show the evaluation in every logger.

    ``after``: the captions of the samples. A logger that fails is named in a warning: what it would show is in
    results.json already.
    """
    samples, before = sample_questions(triples, settings.plain.samples), captions_before(run) or after
    records, find = sample_records(settings, triples, samples, before, after, noise_responses(run))
    if records:
        kept_samples.write(run, records, find)
        title = f"{results['row']}, seed {results['seed']}: captions before and after training"
        kept_samples.write_captions(run, title, f"model {results['model']}, data {results['data']}")
    try:
        loggers = make_loggers(settings.loggers, RunContext.of(settings, run, "eval"))
        show_results(loggers, results)
        for logger in loggers:
            if isinstance(logger, WandbRun):
                logger.log_tables(
                    samples=lambda: dashboards.sample_table(records, find),
                    flipped_answers=lambda: dashboards.flip_table(flipped(settings, run)),
                )
        close(loggers)
    except Exception as error:  # whatever a logger raises
        log.warning("a logger failed (%s: %s); all scores are in %s", type(error).__name__, error, run / "results.json")


def sample_records(
    settings: Settings,
    triples: Sequence[Triple],
    samples: Sequence[Question],
    before: Sequence[str],
    now: Sequence[str],
    noise: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dashboards.Finder | None]:
    """The samples as :func:`povid.report.dashboards.table_rows` takes them, and what finds objects in a text.

    ``before``, ``now``: captions; ``noise``: y_l^n by record.
    """
    distortion = settings.distortion.among(Pictures([picture for triple in triples for picture in triple.pictures]))
    records = []
    for sample, was, says in zip(samples, before, now):
        number = sample.meta["record"]
        triple = triples[number]
        pictures = [open_picture(picture) for picture in triple.pictures]
        sources = [generator(seed=settings.plain.seed, epoch=0, record=number, picture=i) for i in range(len(pictures))]
        noised = [distort_picture(distortion, picture, source) for picture, source in zip(pictures, sources)]
        records.append(
            {
                "id": triple.id,
                "image": side_by_side(pictures),
                "question": triple.question,
                "before": was,
                "after": says,
                "noised": side_by_side(noised),
                "preferred": triple.preferred[-1].text,
                "dispreferred": triple.dispreferred[-1].text,
                "noise": noise.get(triple.id),
                "objects": triple.meta.get("objects"),
            }
        )
    synonyms = Path(settings.data.benchmarks or "") / "synonyms.txt"
    known = read_synonyms(synonyms) if synonyms.is_file() else None
    return records, (lambda text: objects(text, known)) if known else None
