"""Answer and score a selection of benchmarks: everything is checked first, every answer kept, nothing asked twice."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.processes import ALONE, Processes, ProcessFailed
from povid.fault import Fault
from povid.files import read_json, write_bytes, write_json, write_text
from povid.model.question import Answerer, Decoding, Question
from povid.preferences.pictures import digest_of
from povid.preferences.stored import picture_bytes
from povid.preferences.triple import Image as Shown
from povid.preferences.triple import pictures_of
from povid.terminal import counted

log = logging.getLogger(__name__)

PICTURE_BYTES = 2**19  # of a larger picture only the size and this many bytes are compared


@dataclass(frozen=True, slots=True)
class Plan:
    """One benchmark of a selection with its questions, ready to be answered."""

    name: str
    benchmark: Benchmark
    questions: list[Question]


def check(benchmarks: Mapping[str, Benchmark], judge: Any = None) -> dict[str, dict[str, str]]:
    """What is missing, files or a judge: name → {"missing", "cure"}, empty if nothing is. Nothing is answered.

    The judge's server is tried, so that one which is away is told before hours of work and not after them.
    """
    missing = {}
    for name, plan in _plans(benchmarks).items():
        if isinstance(plan, dict):
            missing[name] = plan
        elif plan.benchmark.judged == "always":
            usable, reason = _usable(judge, plan.benchmark, reach=True)
            if usable is None:
                missing[name] = {
                    "missing": reason,
                    "cure": "start the judge's server, or set judge.model, judge.base_url or its key; until then "
                    "answers are kept and can be judged later",
                }
    return missing


def run(
    benchmarks: Mapping[str, Benchmark],
    answer: Answerer,
    out: Path,
    judge: Any = None,
    *,
    model: str = "povid",
    processes: Processes = ALONE,
) -> dict[str, dict[str, Any]]:
    """Name → scores, or {"missing": reason, "cure": what to do} if a benchmark could not be answered or scored.

    A failure also has {"open": True} where running again, once its reason is gone, would complete the benchmark: a
    server that refused, a damaged file. What was known to be missing beforehand, and an error in a scorer, has not.

    ``out/NAME`` receives answers.jsonl (LLaVA's records, one line as each answer arrives), the official answer files in
    ``official`` and scores.json; a second run resumes where the first stopped. ``model`` identifies who answers:
    answers of another model, to other questions or with other decoding settings are refused.

    With several ``processes`` this is the first one's part: the others :func:`follow`, and ``answer`` is each one's
    share. It ends with what they are told: whether every benchmark was answered and scored.

    Raises:
        ProcessFailed: another process failed in a way that ends the run.
    """
    results: dict[str, dict[str, Any]] = {}
    answered: list[tuple[Plan, list[str]]] = []
    for name, plan in sorted(_plans(benchmarks).items(), key=lambda item: _scores_again(item[1])):
        if isinstance(plan, dict):
            log.warning("%s is skipped: %s", name, plan["missing"])
            results[name] = plan
            continue
        folder = Path(out) / name
        try:
            benchmark = plan.benchmark
            answers = kept_answers(
                name,
                plan.questions,
                benchmark.decoding,
                answer,
                folder,
                model,
                _given(plan, answered),
                benchmark.limited,
                processes,
            )
        except ProcessFailed:
            raise
        except Fault as fault:
            cure = "fix that and run again; the answers so far are kept"
            results[name] = {"missing": str(fault), "cure": cure, "open": True}
            continue
        answered.append((plan, answers))
        results[name] = _scored(plan, answers, folder, judge)
    processes.exchange(not any(result.get("open") for result in results.values()))
    return {name: results[name] for name in benchmarks}


def follow(benchmarks: Mapping[str, Benchmark], answer: Answerer, out: Path, model: str, processes: Processes) -> bool:
    """Answer this process's share of what the first process asks (:func:`run`) into a file beside the first one's.

    Returns whether every benchmark was answered and scored.

    Raises:
        ProcessFailed: another process failed in a way that ends the run.
    """
    while isinstance(order := processes.exchange(None)[0], dict):
        name = order["name"]
        try:
            with processes.together():
                benchmark = benchmarks[name]
                questions = benchmark.loaded()
                asked = _asked(questions, benchmark.decoding, benchmark.limited, model)
                if differing := [key for key in asked if asked[key] != order["asked"].get(key)]:
                    raise Fault(
                        f"{name}: this process would ask something else than the first ({', '.join(differing)}); give "
                        "every machine of the run the same files"
                    )
                file = _part(Path(out) / name / "answers.jsonl", processes.number)
                _write_answers(
                    name, questions, order["unanswered"], benchmark.decoding, answer, file, model, processes.check
                )
        except ProcessFailed:
            raise
        except Fault:
            continue  # the first process says so
    return order


def columns(benchmarks: Mapping[str, Benchmark]) -> list[dict[str, Any]]:
    """The tables' columns of a selection, as plain values; keys begin with the benchmark's name in the selection."""
    return [
        asdict(column) | {"key": f"{name}.{column.key.partition('.')[2]}"}
        for name, benchmark in benchmarks.items()
        for column in benchmark.columns
    ]


def _usable(judge: Any, benchmark: Benchmark, *, reach: bool = False) -> tuple[Any, str]:
    """The judge, or None with the reason: there is none, it has no key, or with ``reach`` its server is away."""
    if judge is None:
        return None, f"{benchmark.name} needs a judge, and none is configured"
    try:
        endpoint = judge.endpoint(benchmark)
        if reach:
            endpoint.reach()
    except Fault as fault:
        return None, str(fault)
    return judge, ""


def _plans(benchmarks: Mapping[str, Benchmark]) -> dict[str, Plan | dict[str, str]]:
    """Every benchmark with its questions, or what is missing."""
    plans: dict[str, Plan | dict[str, str]] = {}
    for name, benchmark in benchmarks.items():
        try:
            plans[name] = _plan(name, benchmark)
        except Fault as fault:
            cure = f"python -m povid.benchmarks fetch {benchmark.spelling()} --data {benchmark.data}"
            plans[name] = {"missing": str(fault), "cure": cure}
    return plans


def _plan(name: str, benchmark: Benchmark) -> Plan:
    questions = benchmark.loaded()
    if not questions:
        raise Fault(f"{name} has no question in {benchmark.data}; put its official files there")
    check_images(name, questions)
    return Plan(name, benchmark, questions)


def check_images(name: str, questions: Sequence[Question]) -> None:
    """Every image exists and opens: only its header is read, so thousands take a second."""
    images = {picture: question.id for question in questions for picture in pictures_of(question.image)}
    files = {image: asked for image, asked in images.items() if isinstance(image, Path)}
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise Fault(
            f"{name}: {len(missing)} of {len(files)} images are missing, the first is {missing[0]} "
            f"(question {files[missing[0]]!r}); put them there or set benchmarks.{name}.images"
        )
    for image, asked in images.items():
        try:
            Image.open(image if isinstance(image, Path) else io.BytesIO(picture_bytes(image))).close()
        except (OSError, Image.DecompressionBombError) as error:
            where = image if isinstance(image, Path) else "its embedded image"
            raise Fault(
                f"{name} question {asked!r}: {where} is not a readable image ({error}); download it again"
            ) from None


def _scores_again(plan: Plan | dict[str, str]) -> bool:
    """Whether a benchmark scores the answers of another one again, and so comes after it."""
    return isinstance(plan, Plan) and plan.benchmark.again is not None


def _given(plan: Plan, answered: Sequence[tuple[Plan, list[str]]]) -> dict[int, str]:
    """Index → answer of the questions that the benchmark named by ``again`` has already asked."""
    known: dict[tuple[str | int, str, str], str] = {}
    for other, answers in answered:
        if type(other.benchmark) is plan.benchmark.again and other.benchmark.decoding == plan.benchmark.decoding:
            pictures = _pictures(other.questions)
            for question, text in zip(other.questions, answers, strict=True):
                known[question.id, question.text, pictures[question.image]] = text
    if not known:
        return {}
    pictures = _pictures(plan.questions)
    keys = [(question.id, question.text, pictures[question.image]) for question in plan.questions]
    return {i: known[key] for i, key in enumerate(keys) if key in known}


def kept_answers(
    name: str,
    questions: Sequence[Question],
    decoding: Decoding,
    answer: Answerer,
    folder: Path,
    model: str,
    given: Mapping[int, str] | None = None,
    limited: Mapping[str, int] | None = None,
    processes: Processes = ALONE,
) -> list[str]:
    """Answers in the order of the questions: those on disk, those ``given`` already, then the others.

    Each is written to ``folder/answers.jsonl`` as it arrives, by another process to ``answers.N.jsonl``; in the end
    ``answers.jsonl`` holds all of them in the order of the questions. ``model`` identifies who answers, ``limited`` is
    a benchmark's (:attr:`Benchmark.limited`).

    Raises:
        Fault: the folder holds answers of another model, to other questions or with other decoding settings, or a
            question got no answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "answers.jsonl"
    wanted = _asked(questions, decoding, limited, model)
    _claim(wanted, folder / "asked.json", file)
    done = _collected(questions, file, model)
    if taken := {i: text for i, text in (given or {}).items() if i not in done}:
        log.info("%s: answers that are scored again, without asking: %d", name, len(taken))
        with file.open("a", encoding="utf-8") as sink:
            sink.writelines(json.dumps(_row(questions[i], text, model)) + "\n" for i, text in taken.items())
        done |= taken
    unanswered = [i for i in range(len(questions)) if i not in done]
    if unanswered:
        processes.exchange({"name": name, "asked": wanted, "unanswered": unanswered})
        with counted(log, name, len(questions), len(done)) as count:
            others = _Others([_part(file, number) for number in range(1, processes.of)], count)

            def each() -> None:
                count()
                others.count()
                processes.check()

            with processes.together():
                _write_answers(name, questions, unanswered, decoding, answer, file, model, each)
            others.count(0)
        done = _collected(questions, file, model)
        _write(questions, done, file, model)
    if len(done) < len(questions):
        raise Fault(f"{name}: {len(done)} of {len(questions)} questions are answered; run again to resume")
    return [done[i] for i in range(len(questions))]


def _part(file: Path, number: int) -> Path:
    """Where process ``number`` writes its part of ``file``."""
    return file.with_suffix(f".{number}{file.suffix}") if number else file


def _write_answers(
    name: str,
    questions: Sequence[Question],
    unanswered: Sequence[int],
    decoding: Decoding,
    answer: Answerer,
    file: Path,
    model: str,
    each: Callable[[], None],
) -> None:
    """Append answers to ``unanswered`` questions as they arrive; call ``each`` after each of them.

    Raises:
        Fault: a question was answered twice.
    """
    answers, said = answer([questions[i] for i in unanswered], decoding), set()
    with file.open("a", encoding="utf-8") as sink:
        try:
            for position, text in answers:
                index = unanswered[position]
                if index in said:
                    raise Fault(
                        f"{name} question {questions[index].id!r} was answered twice in one run; an answerer "
                        "must yield each index once"
                    )
                said.add(index)
                sink.write(json.dumps(_row(questions[index], text, model)) + "\n")
                sink.flush()
                each()
        finally:
            if close := getattr(answers, "close", None):
                close()  # now: answers that several processes make in step must all end before the next exchange


class _Others:
    """Counts the lines that other processes write to ``files`` while this one answers."""

    def __init__(self, files: Sequence[Path], count: Callable[[], None]) -> None:
        self.files, self.one, self.seen, self.looked = files, count, 0, time.monotonic()

    def count(self, every: float = 1.0) -> None:
        """Count what is new, if nobody has looked for ``every`` seconds."""
        if self.files and time.monotonic() - self.looked >= every:
            lines = sum(file.read_bytes().count(b"\n") for file in self.files if file.exists())
            for _ in range(lines - self.seen):
                self.one()
            self.seen, self.looked = lines, time.monotonic()


def _collected(questions: Sequence[Question], file: Path, model: str) -> dict[int, str]:
    """Index → answer of what is on disk; what other processes have written is merged into ``file``."""
    done = dict(_kept(questions, file, model))
    parts = sorted(file.parent.glob(f"{file.stem}.[0-9]*{file.suffix}"))
    for part in parts:
        done = dict(_kept(questions, part, model)) | done
    if parts:
        _write(questions, done, file, model)
        for part in parts:
            part.unlink()
    return done


def _write(questions: Sequence[Question], done: Mapping[int, str], file: Path, model: str) -> None:
    """Make ``file`` hold these answers in the order of the questions, whoever gave them in whatever order."""
    rows = (json.dumps(_row(questions[i], done[i], model)) + "\n" for i in sorted(done))
    content = "".join(rows).encode()
    if not file.is_file() or file.read_bytes() != content:
        write_bytes(file, content)


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


def _asked(
    questions: Sequence[Question], decoding: Decoding, limited: Mapping[str, int] | None, model: str
) -> dict[str, Any]:
    """What is asked and who answers, as asked.json records it."""
    asked = {"model": model, "decoding": asdict(decoding), "questions": len(questions)}
    return asked | ({"limit": limited["limit"]} if limited else {}) | content(questions)


def _claim(wanted: Mapping[str, Any], note: Path, answers: Path) -> None:
    """Record what is asked, or refuse a folder whose answers belong to other questions, decoding or model."""
    if not note.is_file():
        if answers.is_file() and answers.stat().st_size:
            raise Fault(f"{answers} exists without {note.name}, so it is unknown what was asked; move it away")
        write_json(note, wanted)
        return
    found = read_json(note, dict, f"move the folder {note.parent} away and run again")
    for key, what in (
        ("model", "by a different model"),
        ("decoding", "with different decoding settings"),
        ("limit", "under another benchmarks.limit"),
        ("questions", "to a different number of questions"),
        ("texts", "to different questions"),
        ("pictures", "about different pictures"),
        ("truth", "to questions with other reference answers"),
    ):
        if found.get(key) != wanted.get(key):
            raise Fault(
                f"{answers} holds answers {what} ({found.get(key)} there, {wanted.get(key)} now); choose another "
                "output folder or move that one away"
            )


def content(questions: Sequence[Question]) -> dict[str, str]:
    """What is asked, about which pictures, and what the answers are compared with: a digest of each."""
    pictures = _pictures(questions)
    found = {name: hashlib.sha256() for name in ("texts", "pictures", "truth")}
    for question in questions:
        found["texts"].update(json.dumps([question.id, question.text]).encode())
        found["pictures"].update(pictures[question.image].encode())
        found["truth"].update(json.dumps(question.meta, sort_keys=True, default=_plain).encode())
    return {name: value.hexdigest()[:16] for name, value in found.items()}


def _pictures(questions: Sequence[Question]) -> dict[Shown, str]:
    """Image → its digest."""
    return {image: digest_of(image, PICTURE_BYTES) for image in dict.fromkeys(q.image for q in questions)}


def _plain(value: Any) -> Any:
    """What JSON has no form for; a file counts by its name, so that data may be moved."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.name if isinstance(value, Path) else str(value)


def _kept(questions: Sequence[Question], file: Path, model: str) -> Iterator[tuple[int, str]]:
    """(index, answer) of what is on disk; a last line that was only partly written is removed from the file.

    An answer that no longer fits its ``answer_id`` was changed after it was given. It is moved to the file
    ``answers_not_used.jsonl``, and its question is asked again.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
    places = {json.dumps(question.id): i for i, question in enumerate(questions)}
    lines = whole.split(b"\n")[:-1]
    changed = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
            place, text = json.dumps(row["question_id"]), row["text"]
            index = places[place]
            if row.get("answer_id") != _row(questions[index], text, model)["answer_id"]:
                changed.append(line)
                continue
            del places[place]
        except (ValueError, KeyError, TypeError):
            raise Fault(f"{file} line {number} is not an answer to an unanswered question; remove that line") from None
        yield index, text
    if changed:
        aside = file.with_name("answers_not_used.jsonl")
        log.warning(
            "%s: answers that were changed after they were given: %d; they are moved to %s and asked for again",
            file,
            len(changed),
            aside.name,
        )
        with aside.open("ab") as sink:
            sink.writelines(line + b"\n" for line in changed)
        write_bytes(file, b"".join(line + b"\n" for line in lines if line not in changed))


def _scored(plan: Plan, answers: Sequence[str], folder: Path, judge: Any) -> dict[str, Any]:
    benchmark, official = plan.benchmark, folder / "official"
    try:
        official = benchmark.write_official(plan.questions, answers, official)
        usable, reason = (None, "") if benchmark.judged == "never" else _usable(judge, benchmark)
        if benchmark.judged == "always" and usable is None:
            cure = _scoring_command(benchmark, official) + " --judge-model MODEL"
            return {"missing": f"answered but not judged: {reason}", "cure": cure}
        score = benchmark.score(plan.questions, answers, usable)
    except Exception as error:  # whatever went wrong here, the other benchmarks are still scored
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # which stops the run, with a sentence
        if not isinstance(error, Fault):
            log.exception("scoring %s failed", plan.name)
        reason = str(error) if isinstance(error, Fault) else f"scoring failed: {type(error).__name__}: {error}"
        failure = {"missing": reason, "cure": _scoring_command(benchmark, official)}
        return failure | ({"open": True} if isinstance(error, Fault) else {})
    scores = score.scores | {"decoding": asdict(benchmark.decoding)}
    if benchmark.limited:
        scores["limit"] = benchmark.limited
    content = json.dumps({"scores": scores, "records": score.records}, indent=1)  # ASCII: answers may hold anything
    write_text(folder / "scores.json", content)
    return scores


def _scoring_command(benchmark: Benchmark, answers: Path) -> str:
    limit = f" --limit {benchmark.limit}" if benchmark.limited else ""
    return f"python -m povid.benchmarks {benchmark.spelling()} --answers {answers} --data {benchmark.data}{limit}"
