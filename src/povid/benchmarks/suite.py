"""Answers and scores a selection of benchmarks: everything checked first, every answer kept, nothing asked twice."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from tqdm import tqdm

from povid.benchmarks.answer_file import write_text
from povid.fault import Fault
from povid.model.question import Answerer, Decoding, Question, Score

log = logging.getLogger(__name__)

BENCHMARKS = {
    "chair": "povid.benchmarks.chair",
    "pope": "povid.benchmarks.pope",
    "mmhal": "povid.benchmarks.mmhal",
    "science_qa": "povid.benchmarks.science_qa",
    "mme": "povid.benchmarks.mme",
    "mmbench": "povid.benchmarks.mmbench",
    "mm_vet": "povid.benchmarks.mm_vet",
    "llava_bench": "povid.benchmarks.llava_bench",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One benchmark ready to be answered."""

    name: str
    module: ModuleType
    questions: list[Question]
    decoding: Decoding
    data: Path
    scoring: dict[str, Any]


def check_name(name: str) -> None:
    """Fault, with a suggestion, for a benchmark that there is not."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(BENCHMARKS)}."
        raise Fault(f"There is no benchmark {name!r}; {hint}")


def module_of(name: str) -> ModuleType:
    """The module of a benchmark; Fault for a name that there is not."""
    check_name(name)
    return importlib.import_module(BENCHMARKS[name])


def judged(module: ModuleType) -> bool:
    """Whether a benchmark cannot be scored without a judge."""
    judge = inspect.signature(module.score).parameters.get("judge")
    return judge is not None and judge.default is inspect.Parameter.empty


def check(selection: Mapping[str, Mapping[str, Any]], judge: Any = None) -> dict[str, dict[str, str]]:
    """What would be missing, files and judges: name → {"missing", "cure"}, empty where all is there.

    Nothing is answered. Raises Fault for what is wrong in the configuration itself: an unknown benchmark or setting.
    """
    lacking = {}
    for name, plan in _plans(selection).items():
        if isinstance(plan, dict):
            lacking[name] = plan
        elif judged(plan.module):
            usable, reason = _usable(judge, name)
            if usable is None:
                lacking[name] = {
                    "missing": reason,
                    "cure": "set judge.model, judge.base_url or its key; until then "
                    "answers are kept and can be judged later",
                }
    return lacking


def run(
    selection: Mapping[str, Mapping[str, Any]],
    answer: Answerer,
    out: Path,
    judge: Any = None,
    *,
    model: str = "povid",
) -> dict[str, dict[str, Any]]:
    """Name → scores, or {"missing": reason, "cure": what to do} where a benchmark could not be answered or scored.

    ``selection``: name → settings (``data``; ``images``, ``max_new_tokens``, ``temperature`` and what the benchmark's
    ``load`` takes). ``out/NAME`` receives answers.jsonl (LLaVA's records, one line as each answer comes), the official
    answer files in ``official`` and scores.json; a second run goes on where the first stopped. ``model`` names who
    answers, and answers of another model, other questions or another decoding are refused.
    """
    plans = _plans(selection)
    results: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        if isinstance(plan, dict):
            log.warning("%s is left out: %s", name, plan["missing"])
            results[name] = plan
            continue
        folder = Path(out) / name
        try:
            answers = _answers(plan, answer, folder, model)
        except Fault as fault:
            results[name] = {"missing": str(fault), "cure": "mend that and run again; the answers given are kept"}
            continue
        results[name] = _scored(plan, answers, folder, judge)
    return results


def _usable(judge: Any, name: str) -> tuple[Any, str]:
    """The judge, or None with the reason: there is none, or it has no key."""
    if judge is None:
        return None, f"{name} needs a judge, and none is configured"
    try:
        judge.endpoint(name)
    except Fault as fault:
        return None, str(fault)
    return judge, ""


def _plans(selection: Mapping[str, Mapping[str, Any]]) -> dict[str, Plan | dict[str, str]]:
    """Every benchmark loaded, or what it lacks. Names and settings are judged first, for they are cheap to check."""
    modules = {name: module_of(name) for name in selection}
    for name, settings in selection.items():
        check_settings(name, settings)
    plans: dict[str, Plan | dict[str, str]] = {}
    for name, settings in selection.items():
        try:
            plans[name] = _plan(name, modules[name], settings)
        except Fault as fault:
            cure = f"python -m povid.benchmarks fetch {name} --data {settings['data']}"
            plans[name] = {"missing": str(fault), "cure": cure}
    return plans


_DECODING = ("max_new_tokens", "temperature")


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Fault for a setting that the benchmark does not have, and for one that it cannot do without."""
    module = module_of(name)
    known = [*inspect.signature(module.load).parameters, *_scoring_settings(module), *_DECODING]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(known)}."
            raise Fault(f"Benchmark {name} has no setting {key!r}; {hint}")
    if not settings.get("data"):
        raise Fault(f"Benchmark {name} has no data; set benchmarks.{name}.data to the folder of its official files.")


def _scoring_settings(module: ModuleType) -> list[str]:
    return [key for key in inspect.signature(module.score).parameters if key not in ("questions", "answers", "judge")]


def _plan(name: str, module: ModuleType, settings: Mapping[str, Any]) -> Plan:
    data, images = Path(settings["data"]), settings.get("images")
    changed = {key: settings[key] for key in _DECODING if settings.get(key) is not None}
    scoring = {key: settings[key] for key in _scoring_settings(module) if key in settings}
    own = {key: value for key, value in settings.items() if key not in ("data", "images", *_DECODING, *scoring)}
    questions = module.load(data, Path(images) if images else None, **own)
    if not questions:
        raise Fault(f"{name} has no question in {data}; put its official files there.")
    _check_images(name, questions)
    return Plan(name, module, questions, replace(module.DECODING, **changed), data, scoring)


def _check_images(name: str, questions: Sequence[Question]) -> None:
    """Every picture is there and opens: only its head is read, so thousands take a second."""
    files = {question.image: question.id for question in questions if isinstance(question.image, Path)}
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise Fault(
            f"{name} lacks {len(absent)} of {len(files)} pictures, the first is {absent[0]} "
            f"(question {files[absent[0]]!r}); put them there or set benchmarks.{name}.images."
        )
    pictures = {**files, **{question.image: question.id for question in questions if isinstance(question.image, bytes)}}
    for picture, asked in pictures.items():
        try:
            Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture).close()
        except (OSError, Image.DecompressionBombError) as error:
            where = picture if isinstance(picture, Path) else "its embedded picture"
            raise Fault(f"{name} question {asked!r}: {where} is no readable picture ({error}); get it again.") from None


def _answers(plan: Plan, answer: Answerer, folder: Path, model: str) -> list[str]:
    """Answers in the order of the questions: those on disk, and the rest as they come, each written at once."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "answers.jsonl"
    _claim(plan, folder / "asked.json", file, model)
    done = dict(_kept(plan, file))
    still_open = [i for i in range(len(plan.questions)) if i not in done]
    asked = [plan.questions[i] for i in still_open]
    if asked:
        with (
            file.open("a", encoding="utf-8") as sink,
            tqdm(total=len(plan.questions), initial=len(done), desc=plan.name, unit="answer") as bar,
        ):
            for position, text in answer(asked, plan.decoding):
                index = still_open[position]
                if index in done:
                    raise Fault(
                        f"{plan.name} question {plan.questions[index].id!r} was answered twice in one run; "
                        "an answerer gives each index once."
                    )
                sink.write(json.dumps(_row(plan.questions[index], text, model)) + "\n")
                sink.flush()
                done[index] = text
                bar.update()
    if len(done) < len(plan.questions):
        raise Fault(f"{plan.name}: {len(done)} of {len(plan.questions)} questions were answered; run again to go on.")
    return [done[i] for i in range(len(plan.questions))]


def _row(question: Question, text: str, model: str) -> dict[str, Any]:
    """What LLaVA's evaluation scripts write for an answer."""
    made = hashlib.sha256(f"{model}\n{question.id}\n{text}".encode(errors="replace")).hexdigest()[:22]
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": text,
        "answer_id": made,
        "model_id": model,
        "metadata": {},
    }


def _claim(plan: Plan, note: Path, answers: Path, model: str) -> None:
    """Write down what is asked, or refuse a folder whose answers belong to other questions, decoding or model."""
    identity = hashlib.sha256()
    for question in plan.questions:
        image = question.image.name.encode() if isinstance(question.image, Path) else question.image or b""
        identity.update(json.dumps([question.id, question.text]).encode() + hashlib.sha256(image).digest())
    wanted = {
        "model": model,
        "decoding": asdict(plan.decoding),
        "questions": len(plan.questions),
        "sha256": identity.hexdigest(),
    }
    if not note.is_file():
        if answers.is_file() and answers.stat().st_size:
            raise Fault(f"{answers} lies there without {note.name}, so nobody knows what was asked; move it away.")
        write_text(note, json.dumps(wanted, indent=1))
        return
    try:
        there = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise Fault(f"{note} is not JSON; move the folder {note.parent} away and run again.") from None
    for key, name in (
        ("model", "model"),
        ("decoding", "decoding"),
        ("questions", "number of questions"),
        ("sha256", "questions"),
    ):
        if there.get(key) != wanted[key]:
            raise Fault(
                f"{answers} was answered with another {name} ({there.get(key)} there, {wanted[key]} now); "
                "choose another output folder or move that one away."
            )


def _kept(plan: Plan, file: Path) -> Iterator[tuple[int, str]]:
    """(index, answer) of what is on disk; a last line cut off in the middle of writing is dropped from the file."""
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
    places = {json.dumps(question.id): i for i, question in enumerate(plan.questions)}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            index, text = places.pop(json.dumps(row["question_id"])), row["text"]
        except (ValueError, KeyError, TypeError):
            raise Fault(f"{file} line {number} is no answer to a question still open; remove that line.") from None
        yield index, text


def _scored(plan: Plan, answers: Sequence[str], folder: Path, judge: Any) -> dict[str, Any]:
    again = f"python -m povid.benchmarks {plan.name} --answers {folder / 'official'} --data {plan.data}"
    try:
        official = plan.module.write_official(plan.questions, answers, folder / "official")
        again = again.replace(str(folder / "official"), str(official))
        takes_judge = "judge" in inspect.signature(plan.module.score).parameters
        usable, reason = _usable(judge, plan.name) if takes_judge else (None, "")
        if judged(plan.module) and usable is None:
            return {"missing": f"answered, not judged: {reason}", "cure": again + " --judge-model MODEL"}
        score = scored(plan.module, plan.questions, answers, usable, **plan.scoring)
    except Exception as error:  # whatever went wrong here, the other benchmarks still deserve their scores
        if not isinstance(error, Fault):
            log.exception("scoring %s failed", plan.name)
        reason = str(error) if isinstance(error, Fault) else f"scoring failed: {type(error).__name__}: {error}"
        return {"missing": reason, "cure": again}
    scores = score.scores | {"decoding": asdict(plan.decoding)}
    write_text(folder / "scores.json", json.dumps({"scores": scores, "records": score.records}, indent=1))
    return scores


def scored(
    module: ModuleType, questions: Sequence[Question], answers: Sequence[str], judge: Any = None, **settings: Any
) -> Score:
    """The score of one benchmark, with the judge where it takes one."""
    if "judge" in inspect.signature(module.score).parameters:
        return module.score(questions, answers, judge=judge, **settings)
    return module.score(questions, answers, **settings)
