"""What the policy makes of a few samples while a stage trains, and which yes/no answers training has changed."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from povid import files
from povid.benchmarks.pope import POPE, says_no
from povid.benchmarks.processes import Processes
from povid.fault import Fault
from povid.method.noise_dispreferred import most_likely
from povid.model.policy import Policy
from povid.model.question import Answerer
from povid.report import dashboards
from povid.run.settings import Settings
from povid.run.wandb_run import WandbRun

log = logging.getLogger(__name__)

ASKED = 48  # yes/no questions before training


class Samples(L.Callback):
    """Logs a table of samples every so many steps, and keeps the y_l^n of the samples at the end of the stage.

    It draws no random number and leaves the training as it is. It runs on the first process, for which the others wait.

    Args:
        home: the stage's folder.
        records: the numbers of the samples among the held-out records or, without any, among those to train on.
        every: steps between two tables; None for no table while the stage trains.
        policy: what answers.
        captions: gives its captions of the samples.
        shown: makes the table's records from captions and y_l^n, and gives what finds the objects of a text.
    """

    def __init__(
        self,
        home: Path,
        records: Sequence[int],
        every: int | None,
        policy: Policy,
        captions: Callable[[], list[str]],
        shown: Callable[[Sequence[str], Mapping[str, Any]], tuple[list[dict[str, Any]], Any]],
    ) -> None:
        self.home, self.records, self.every = home, records, every
        self.policy, self.captions, self.shown = policy, captions, shown

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]
        due = self.every and module.stepped and trainer.global_step % self.every == 0
        if not (due and loggers and trainer.is_global_zero):
            return
        with undisturbed(self.policy):
            records, find = self.shown(self.captions(), self._noise(trainer, module))
        for logger in loggers:
            logger.log_tables(trainer.global_step - 1, samples=lambda: dashboards.sample_table(records, find))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            with undisturbed(self.policy):
                found = self._noise(trainer, module)
            if found:
                files.write_json(self.home / NOISE, found)

    def _noise(self, trainer: Any, module: Any) -> dict[str, list[tuple[str, bool]]]:
        """y_l^n of every sample: pieces of text, and whether each differs from y_w; nothing in a stage without x^n."""
        data = trainer.datamodule
        dataset = data.held_out if len(data.held_out) else data.dataset
        if dataset.distortion is None:
            return {}
        found = {}
        tokenizer = self.policy.processor.tokenizer
        for record in self.records:
            example = dataset[record, 0]
            batch = module.transfer_batch_to_device(data.collate([example]), module.device, 0)
            with trainer.precision_plugin.forward_context():
                logits_UV = self.policy.predict(batch.preferred, self.policy.look(batch.noised))
            side = batch.preferred.preferred
            chosen_N = most_likely(logits_UV)[side.position_N]
            differs = (chosen_N != side.token_N).tolist()
            found[example.name] = list(zip(_pieces(tokenizer, chosen_N.tolist()), differs))
        return found


NOISE = "noise_responses.json"


def noise_responses(run: Path) -> dict[str, list[tuple[str, bool]]]:
    """y_l^n of the samples at the end of the last stage that has them, by record."""
    for file in sorted(run.glob(f"stage_*/{NOISE}"), reverse=True):
        cure = "move it away to leave out these responses"
        found = files.read_json(file, dict, cure)
        try:
            return {name: [(str(text), bool(differs)) for text, differs in pieces] for name, pieces in found.items()}
        except (TypeError, ValueError):
            raise Fault(f"{file} is damaged: it holds no pieces of text with their marks; {cure}") from None
    return {}


@contextmanager
def undisturbed(policy: Policy) -> Iterator[None]:
    """Answer with a policy that is training, without gradient; its modes and the random state are restored."""
    was = [(module, module.training) for module in policy.modules()]
    with torch.random.fork_rng(), torch.no_grad():
        policy.eval()
        try:
            yield
        finally:
            for module, training in was:
                module.training = training


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to a response."""
    texts = [tokenizer.decode(tokens[:count], skip_special_tokens=True) for count in range(len(tokens) + 1)]
    return [now[len(before) :] for before, now in itertools.pairwise(texts)]


# --- yes/no questions ------------------------------------------------------------------------------------------------


def ask_before(settings: Settings, run: Path, answers: Answerer, processes: Processes) -> None:
    """Ask the first yes/no questions of the run's POPE benchmarks before the first stage."""
    file = run / "answers_before.json"
    known = settings.benchmarks.items()
    there = [name for name, benchmark in known if isinstance(benchmark, POPE) and loads(benchmark)]
    wanted = None if file.exists() or not settings.loggers else there
    if (names := processes.exchange(wanted)[0]) is None:
        return
    found: dict[str, dict[str, str]] = {}
    for name in names:
        with processes.together():
            questions = settings.benchmarks[name].loaded()[:ASKED]
        said = processes.ask(answers, questions, settings.benchmarks[name].decoding)
        found[name] = {str(question.id): text for question, text in zip(questions, said, strict=True)}
    if processes.number == 0:
        files.write_json(file, found)


def loads(benchmark: POPE) -> bool:
    """Whether a benchmark's files are there; the run has warned of those that are not."""
    try:
        return bool(benchmark.loaded())
    except Fault:
        return False


def flipped(settings: Settings, run: Path) -> list[dict[str, Any]]:
    """The questions of :func:`ask_before` whose parsed answers changed: picture, question, label, before and after."""
    file = run / "answers_before.json"
    if not file.exists():
        return []
    changed = []
    for name, before in files.read_json(file, dict, "move it away to leave out the changed answers").items():
        lines = (run / "benchmarks" / name / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        after = {str(row["question_id"]): row["text"] for row in map(json.loads, lines)}
        for question in settings.benchmarks[name].loaded()[:ASKED]:
            was, now = before.get(str(question.id)), after.get(str(question.id))
            if was is not None and now is not None and says_no(was) != says_no(now):
                changed.append(
                    {
                        "image": question.image,
                        "question": question.meta["question"],
                        "label": question.meta["label"],
                        "before": was,
                        "after": now,
                    }
                )
    return changed
