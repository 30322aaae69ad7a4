"""The answer file of all LLaVA evaluation scripts (JSON Lines), and answers brought into the order of the questions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question


def by_question_id(file: Path, questions: Sequence[Question]) -> list[str]:
    """Answers of a JSON Lines file (or list) of {"question_id", "text"}, in the order of the questions."""
    return in_order(file, texts(file), questions)


def texts(file: Path, *, key: str = "question_id", text: str = "text") -> Iterable[tuple[str, str, Any]]:
    """(place, id as text, answer) of every record; Fault for a record that is not an object or has no such key."""
    for place, record in read_records(file):
        if not isinstance(record, dict) or key not in record or text not in record:
            has = f"the keys {', '.join(sorted(record))}" if isinstance(record, dict) else f"{record!r:.60}"
            raise Fault(f"{place} has {has}, but an answer needs {key!r} and {text!r}; correct that record")
        yield place, str(record[key]), record[text]


def in_order(
    file: Path,
    found: Iterable[tuple[str, str, Any]],
    questions: Sequence[Question],
    key: Callable[[Question], str] = lambda question: str(question.id),
) -> list[str]:
    """Answers in the order of the questions, whatever their order in the file.

    Raises Fault where ``matched`` does, and for a question without an answer.
    """
    answers = matched(found, questions, key)
    unanswered = [str(question.id) for question, answer in zip(questions, answers) if answer is None]
    if unanswered:
        raise Fault(
            f"{file} answers {len(questions) - len(unanswered)} of {len(questions)} questions, missing "
            f"{', '.join(unanswered[:3])}{' and others' if len(unanswered) > 3 else ''}; "
            "answer all questions before scoring"
        )
    return [answer for answer in answers if answer is not None]


def matched(
    found: Iterable[tuple[str, str, Any]],
    questions: Sequence[Question],
    key: Callable[[Question], str] = lambda question: str(question.id),
) -> list[str | None]:
    """As ``in_order``, with None for a question without an answer.

    Raises Fault for an answer that is not text, for a question that is answered twice or is not in the benchmark.
    """
    position = {key(question): number for number, question in enumerate(questions)}
    answers: list[str | None] = [None] * len(questions)
    places: dict[int, str] = {}
    for place, name, answer in found:
        if name not in position:
            raise Fault(
                f"{place} answers question {name!r:.200}, which is not one of the {len(questions)} "
                "questions; use answers and data of the same version"
            )
        number = position[name]
        if number in places:
            raise Fault(f"{place} answers question {name!r:.200} a second time, first at {places[number]}; keep one")
        if not isinstance(answer, str):
            raise Fault(f"{place} has {answer!r:.60} as its answer where text was expected; correct that record")
        answers[number], places[number] = answer, place
    return answers


def records(questions: Sequence[Question], answers: Sequence[str], model: str = "povid") -> list[dict[str, Any]]:
    """The records that LLaVA's scripts write; ``prompt`` shows the image marker only where they do."""
    return [
        {
            "question_id": question.meta.get("question_id", question.id),
            "prompt": question.text,
            "text": answer,
            "answer_id": hashlib.sha1(whole(f"{question.id}\n{answer}").encode()).hexdigest()[:22],
            "model_id": model,
            "metadata": {},
        }
        for question, answer in zip(questions, answers, strict=True)
    ]


def write_jsonl(file: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object per line, the file whole or not at all."""
    return write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def whole(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()


def needed(benchmark: Benchmark, names: Sequence[str]) -> Path:
    """The first of ``names`` that exists in the benchmark's data; Fault with the command that downloads it if none."""
    for name in names:
        if (benchmark.data / name).exists():
            return benchmark.data / name
    raise Fault(
        f"{benchmark.data} holds no {' or '.join(names)}, which {benchmark.name} needs; "
        f"run `python -m povid.benchmarks fetch {benchmark.spelling()} --data {benchmark.data}`"
    )


def fields(place: str, record: Any, *names: str) -> list[Any]:
    """The values of ``names``; Fault naming the record and the missing key."""
    if not isinstance(record, Mapping):
        raise Fault(f"{place} is {record!r:.60} where an object was expected; download the file again")
    for name in names:
        if name not in record:
            raise Fault(f"{place} has no {name!r}; download the file again")
    return [record[name] for name in names]


def picture(folders: Iterable[Path | None], names: Iterable[str]) -> Path:
    """The first file that exists, each name tried in each folder, or the first path tried.

    Every benchmark finds its pictures here: a file that somebody else made names pictures inside their folder only,
    since they may be sent to a server.

    Raises:
        Fault: a name is absolute, contains ``..`` or is a link that leads out of the folder.
    """
    names = list(names)
    roots = [folder for folder in folders if folder is not None]
    for name in names:
        if not isinstance(name, str):
            raise Fault(f"a picture of {roots[0]} is named {name!r:.60}, needed text; correct that record")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\0" in name:
            raise Fault(f"{name!r:.200} names a picture outside {roots[0]}; correct that record or download it again")
    for folder in roots:
        for name in names:
            place = folder / name
            if os.path.isfile(place):  # False for a name that the file system does not take
                if os.path.commonpath([os.path.realpath(place), os.path.realpath(folder)]) != os.path.realpath(folder):
                    raise Fault(f"{place} is a link to a picture outside {folder}; copy the picture into the folder")
                return place
    return roots[0] / names[0]
