"""A callback that asks the policy a few questions while it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning as L
from pydantic import Field

from povid.benchmarks import suite
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.collapse import neither_rate, repeat_rate
from povid.fault import Fault
from povid.files import digest
from povid.model.generation import Answers
from povid.model.question import Question
from povid.preferences.triple import pictures_of
from povid.run.identity import digest as digest_of
from povid.run.samples import undisturbed
from povid.run.watch import Better, Rows, Watcher

log = logging.getLogger(__name__)

PREFIX = "probe/"


class Probe(Watcher):
    """Captions and asks about a small fixed set of pictures before the first step, every so many, and after the last.

    Logs ``probe/BENCHMARK/SCORE`` for the scores that tables show of each benchmark, how often captions repeat
    themselves and how many answers are neither yes nor no (:mod:`povid.benchmarks.collapse`), in every logger and in
    the stage's probe.csv. The first process answers and the others wait.

    Args:
        captions: a benchmark whose answers are captions, or None.
        questions: a benchmark whose answers are yes or no, or None.
        pictures: the number of pictures, the first ones of each benchmark; all questions about them are asked.
        every: optimizer steps between two probes, or the share of the stage's steps.
        batch_size: questions answered together.
    """

    whole_weights: ClassVar[bool] = True

    def __init__(
        self,
        captions: Benchmark | None = None,
        questions: Benchmark | None = None,
        pictures: Annotated[int, Field(ge=1)] = 50,
        every: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 0.25,
        batch_size: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        self.captions, self.questions = captions, questions
        self.pictures, self.every, self.batch_size = pictures, every, batch_size
        self.due: set[int] = set()
        self.rows: Rows | None = None
        if captions is None and questions is None:
            raise ValueError("captions: captions and questions are both null; give one of them a benchmark")
        for kind, benchmark in self._kinds():
            if not isinstance(benchmark, Benchmark):
                raise ValueError(f"{kind}: found {benchmark!r}, needed a benchmark, as those of conf/benchmarks are")
            if benchmark.judged == "always":
                raise ValueError(f"{kind}: {benchmark.name} needs a judge, which a probe has not; choose another")

    def _kinds(self) -> Iterator[tuple[str, Benchmark]]:
        yield from ((k, b) for k, b in (("captions", self.captions), ("questions", self.questions)) if b is not None)

    @property
    def metrics(self) -> Mapping[str, Better | None]:
        found: dict[str, Better | None] = {}
        for kind, benchmark in self._kinds():
            found |= {f"{PREFIX}{column.key.replace('.', '/')}": column.better for column in benchmark.columns}
            found[f"{PREFIX}{benchmark.name}/{'repeats' if kind == 'captions' else 'neither'}"] = "low"
        return found

    def asked(self, benchmark: Benchmark) -> list[Question]:
        """The questions about the first pictures.

        Raises:
            Fault: a file is missing or damaged, or there is no question.
        """
        try:
            every = benchmark.loaded()
            images = list(dict.fromkeys(question.image for question in every))[: self.pictures]
            chosen = [question for question in every if question.image in set(images)]
            if not chosen:
                raise Fault(f"{benchmark.data} holds no question")
            suite.check_images(benchmark.name, chosen)
        except Fault as fault:
            raise Fault(
                f"callbacks.probe: {fault}; the probe asks about pictures of its own: name their folder with "
                "data.probe=FOLDER, or leave the probe out"
            ) from None
        return chosen

    def content(self) -> str:
        """A digest of the questions, their pictures and their true answers."""
        return digest_of([[kind, suite.content(self.asked(benchmark))] for kind, benchmark in self._kinds()])

    def before(self, benchmarks: Mapping[str, Benchmark]) -> None:
        """Warn where the evaluation asks about a picture of the probe's; benchmarks without their files ask nothing."""
        asked = (question for _, benchmark in self._kinds() for question in self.asked(benchmark))
        own = {digest(picture) for question in asked for picture in pictures_of(question.image)}
        for name, benchmark in benchmarks.items():
            with suppress(Fault):
                images = dict.fromkeys(q.image for q in benchmark.loaded() if isinstance(q.image, Path))
                if image := next((image for image in images if image.is_file() and digest(image) in own), None):
                    log.warning(
                        "the probe and the benchmark %s ask about the same picture (%s): what is chosen by the probe "
                        "is chosen on the test data",
                        name,
                        image,
                    )

    # --- while the stage trains -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, module: L.LightningModule) -> None:
        last = int(trainer.estimated_stepping_batches)
        interval = self.every if isinstance(self.every, int) else max(1.0, self.every * last)
        self.due = {round(interval * number) for number in range(1, int(last / interval) + 1)} | {last}
        self.rows = Rows(Path(trainer.default_root_dir) / "probe.csv", trainer.global_step)
        if trainer.global_step == 0:
            self.measure(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step in self.due and (self.latest is None or self.latest[0] != step):
            self.measure(trainer, module)

    def measure(self, trainer: Any, module: Any) -> None:
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            with undisturbed(module.policy):
                values = self._answered(trainer, module)
            self.rows.add(trainer.global_step, trainer.current_epoch, values)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=max(trainer.global_step - 1, 0))
        if trainer.world_size > 1:
            values = trainer.strategy.broadcast(values)
        self.latest = trainer.global_step, values

    def _answered(self, trainer: Any, module: Any) -> dict[str, float]:
        data = trainer.datamodule
        answers = Answers(module.policy, data.dataset.template, self.batch_size, data.seed)
        values: dict[str, float] = {}
        for kind, benchmark in self._kinds():
            asked = self.asked(benchmark)
            given = dict(answers(asked, benchmark.decoding))
            texts = [given[i] for i in range(len(asked))]
            scores = benchmark.score(asked, texts).scores
            for column in benchmark.columns:
                values[f"{PREFIX}{column.key.replace('.', '/')}"] = float(_at(scores, column.key.partition(".")[2]))
            rate, name = (repeat_rate, "repeats") if kind == "captions" else (neither_rate, "neither")
            values[f"{PREFIX}{benchmark.name}/{name}"] = rate(texts)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"content": self.content(), "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["content"] != self.content():
            raise Fault(
                "callbacks.probe: its questions or pictures have changed since the stage began; restore them to resume"
            )
        self.latest = state["latest"] and (state["latest"][0], dict(state["latest"][1]))


def _at(scores: Mapping[str, Any], path: str) -> Any:
    for part in path.split("."):
        scores = scores[part]
    return scores
