"""MMBench (English dev): multiple choice, right only if right under every rotation of the options."""

from __future__ import annotations

import base64
import binascii
import io
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas

from povid.benchmarks import llava_format
from povid.benchmarks.benchmark import Benchmark, Column, Source, first_groups
from povid.benchmarks.judge import Judge
from povid.benchmarks.wording import Script
from povid.fault import Fault
from povid.files import write_bytes
from povid.model.question import Question, Score
from povid.server.endpoint import Request

TABLES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN_legacy.tsv", "MMBench_DEV_EN.tsv")
SUFFIX = "Answer with the option's letter from the given choices directly."
COPY = 1_000_000  # index of a rotated copy = index of its question + k x COPY
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
SEED = 2680  # of the random option that officially stands in for an unmatched answer
EMPTY = "nan"  # what the official evaluator reads in an empty cell
NO_ANSWER = "Failed to obtain answer via API"  # what official scripts write where a server gave no answer
_DECORATIONS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


class MMBench(Benchmark):
    """``data`` is the table, or a folder with one of TABLES; images are inside it, so ``images`` is not used."""

    name: ClassVar[str] = "mmbench"
    official: ClassVar[str] = (
        "EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks/mmbench/mmbench_evals.py (gpt-3.5-turbo-0613 matches the rest)"
    )
    columns: ClassVar[tuple[Column, ...]] = (Column("mmbench.accuracy", "MMBench", "high", 1),)
    sources: ClassVar[tuple[Source, ...]] = (
        Source(f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{TABLES[0]}", TABLES[0]),
    )
    notice: ClassVar[str] = (
        "If that address is closed, download MMBench_DEV_EN_legacy.tsv as https://github.com/open-compass/MMBench "
        "says and put it into {data}."
    )
    judged: ClassVar[Literal["never", "optional", "always"]] = "optional"
    official_judge: ClassVar[str] = "gpt-3.5-turbo-0613"
    wording: ClassVar[str] = "povid-1"
    prompt_sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "https://raw.githubusercontent.com/EvolvingLMMs-Lab/lmms-eval/75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3/"
            "lmms_eval/tasks/mmbench/mmbench_evals.py",
            "judge/mmbench_evals.py",
            12900,
            "9ee5d11a3fe1044dd697d1ac35cb3450cbba9d8cbbc9295db427c65217149fae",
        ),
    )

    @classmethod
    def own_prompt(cls) -> dict[str, str]:
        """The prompt, and the line above its options."""
        return {"prompt": PROMPT, "options": OPTIONS}

    @classmethod
    def official_prompt(cls, scripts: Mapping[str, str]) -> dict[str, str]:
        """What build_prompt and build_option_str of mmbench_evals.py begin with."""
        script = Script("mmbench_evals.py", scripts["mmbench_evals.py"])
        return {
            "prompt": script.inside("build_prompt").assigned("tmpl"),
            "options": script.inside("build_option_str").assigned("s"),
        }

    def questions(self) -> list[Question]:
        """One question for each row of the table, rotated copies included; pictures are inside the table.

        ``images`` is not used. Raises Fault for a row without question, options, answer or picture.
        """
        file = llava_format.needed(self, TABLES) if self.data.is_dir() else self.data
        try:
            table = pandas.read_table(file)
        except (OSError, ValueError) as error:
            raise Fault(f"{file} is not a readable table ({error}); download it again") from error
        absent = {"index", "question", "A", "B", "answer", "image"} - set(table.columns)
        if absent:
            raise Fault(
                f"{file.name} has no column {min(absent)!r}, like the official table for testing; use the dev table"
            )
        cells = {str(row["index"]): row["image"] for row in table.to_dict("records")}
        questions = []
        for row in table.to_dict("records"):
            options: dict[str, str] = {}
            for letter in "ABCD":
                if _empty(row.get(letter)):
                    break
                options[letter] = str(row[letter])
            hint = "" if _empty(row.get("hint")) else f"{row['hint']}\n"
            lines = "".join(f"\n{letter}. {option}" for letter, option in options.items())
            text = f"{hint}{row['question']}{lines}\n{SUFFIX}"
            if row["answer"] not in options:
                raise Fault(
                    f"{file.name} index {row['index']} has the answer {row['answer']!r} and the options "
                    f"{', '.join(options) or 'none'}; download the table again"
                )
            meta = {
                "options": options,
                "answer": row["answer"],
                "question": str(row["question"]),
                "category": row.get("category"),
                "l2-category": row.get("l2-category"),
                "row": {name: value for name, value in row.items() if name not in DROPPED},
            }
            questions.append(Question(row["index"], _image(file, row["index"], cells), text, meta))
        bases, copies = _groups(questions)
        lost = next((base for base in copies if base not in bases), None)
        if lost is not None:
            raise Fault(
                f"{file.name} has a rotated copy of index {lost} but not index {lost} itself; download it again"
            )
        return questions

    def first(self, questions: Sequence[Question], count: int) -> list[Question]:
        """The first ``count`` questions, each with its rotated copies: it is right only if all of them are."""
        return first_groups(questions, count, lambda question: _index(question) % COPY)

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers from LLaVA's JSON Lines, or from a submission sheet (.xlsx, .tsv, .csv) by index and prediction."""
        return llava_format.in_order(Path(file), _texts(Path(file)), questions)

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """The figures of the official scripts, which score an incomplete file too.

        LLaVA's converter leaves the cell of a missing answer empty, and the evaluator reads an empty cell as "nan". Of
        a sheet the evaluator knows only the rows: a question without its row is left out, and one without some of its
        rotated copies is scored by the others. "unanswered" counts missing answers, "corrected" takes them as wrong.
        Raises Fault where ``read_answers`` does, except for missing answers, and for a file that answers no question.
        """
        given = llava_format.matched(_texts(Path(file)), questions)
        sheet = _is_sheet(Path(file))
        missing = {row for row, answer in enumerate(given) if answer is None or (sheet and not answer)}
        rows = [row for row, answer in enumerate(given) if not sheet or answer is not None]
        bases, _ = _groups([questions[row] for row in rows])
        if len(missing) == len(questions) or not bases:
            raise Fault(f"{file} answers no question of the table; give the answers to be scored")
        rows = [row for row in rows if _index(questions[row]) % COPY in bases]
        answers = [EMPTY if row in missing else given[row] or "" for row in rows]
        score = self.score([questions[row] for row in rows], answers, judge)
        if missing:
            right = {row: record["correct"] and record["by"] != "random" for row, record in zip(rows, score.records)}
            every, groups = _groups(questions)
            hits = {base: all(right.get(row) and row not in missing for row in groups[base]) for base in every}
            score.scores |= {"unanswered": len(missing), "corrected": _figures(questions, every, hits)}
            for row, record in zip(rows, score.records):
                record["answer"] = None if row in missing else record["answer"]
        return score

    def notes(self, score: Score) -> list[str]:
        """What the official scripts make of answers that are missing."""
        if not (count := score.scores.get("unanswered")):
            return []
        return [
            f"rows without an answer: {count}; officially an empty cell is an answer like any other, and a row that "
            "the sheet does not have is left out; corrected takes both as wrong "
            f"(accuracy {score.scores['corrected']['accuracy']:.1f} of all {score.scores['corrected']['questions']} "
            "questions)"
        ]

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """The submission sheet, column for column as LLaVA's scripts/convert_mmbench_for_submission.py makes it.

        Control characters, which no sheet can hold, are left out; LLaVA's JSON Lines are written beside it.
        """
        folder = Path(folder)
        llava_format.write_jsonl(
            folder / "mmbench_answers.jsonl",
            [
                {
                    **record,
                    "round_id": 0,
                    "options": list(question.meta["options"].values()),
                    "option_char": list(question.meta["options"]),
                }
                for record, question in zip(llava_format.records(questions, answers), questions)
            ],
        )
        sheet = pandas.DataFrame([question.meta["row"] for question in questions])
        printable = ["".join(c for c in llava_format.whole(answer) if c >= " " or c in "\t\n\r") for answer in answers]
        sheet.insert(min(6, len(sheet.columns)), "prediction", printable)
        content = io.BytesIO()
        with pandas.ExcelWriter(content, engine="openpyxl") as writer:
            sheet.to_excel(writer, index=False)
            for cells in writer.book.active.iter_rows():
                for cell in cells:
                    if cell.data_type in "fe":  # text such as "=B" or "#N/A", taken for a formula or an error
                        cell.data_type = "s"
        return write_bytes(folder / "mmbench_submission.xlsx", content.getvalue())

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Share (percent) of questions answered right under every rotation, overall, by category and by l2-category.

        The judge matches what rules cannot, three tries for each; officially a random option stands in after that,
        drawn here with the official seed in the official order. "corrected" counts such answers as wrong. Without a
        judge an answer that the rules do not match is wrong, and the score says so.
        """
        parsed = [parse(answer, question.meta["options"]) for question, answer in zip(questions, answers, strict=True)]
        truth = [question.meta["answer"] for question in questions]
        bases, groups = _groups(questions)
        fallen = {base for base, rows in groups.items() if any(parsed[row] not in (None, truth[row]) for row in rows)}
        open_rows = [
            row for base in sorted(groups) if base not in fallen for row in groups[base] if parsed[row] is None
        ]
        matched = self._match(questions, answers, open_rows, judge) if judge else {}
        chance, random_rows = random.Random(SEED), set()
        final = [matched.get(row, option) for row, option in enumerate(parsed)]
        for base in sorted(groups):  # the official order of questions and of drawing
            for row in groups[base] if judge and base not in fallen else []:
                if final[row] is None:
                    final[row] = "ABCDE"[chance.randint(0, 4)]
                    random_rows.add(row)
                if final[row] != truth[row]:
                    break
        hits = {base: all(final[row] == truth[row] for row in rows) for base, rows in groups.items()}
        scores = _figures(questions, bases, hits)
        if random_rows:
            scores["corrected"] = _figures(
                questions, bases, {base: hit and not random_rows & set(groups[base]) for base, hit in hits.items()}
            )
        scores |= {
            "matched_by_rule": sum(option is not None for option in parsed),
            "matched_by_judge": len(matched),
            "random": len(random_rows),
            **(judge.describe(self) if judge else {"judge": None}),
        }
        if judge is None:
            scores["note"] = "no judge: answers that no rule matches count as wrong"
        records = [
            {
                "id": question.id,
                "answer": answer,
                "parsed": option,
                "truth": right,
                "correct": option == right,
                "by": "random" if row in random_rows else "judge" if row in matched else "rule" if option else None,
                "hit": hits[_index(question) % COPY],
            }
            for row, (question, answer, option, right) in enumerate(zip(questions, answers, final, truth))
        ]
        return Score(scores, records)

    def _match(
        self, questions: Sequence[Question], answers: Sequence[str], rows: Sequence[int], judge: Judge
    ) -> dict[int, str]:
        """Row → option (E: none of them) for the rows where the rules could read one of three replies."""
        words, matched = judge.words(self).parts, {}
        for attempt in range(3):
            asked = [row for row in rows if row not in matched]
            requests = [
                request(
                    words,
                    f"mmbench index {questions[row].id}",
                    questions[row].meta["question"],
                    questions[row].meta["options"],
                    answers[row],
                    attempt,
                )
                for row in asked
            ]
            for row, reply in zip(asked, judge.ask(self, requests) if requests else []):
                if option := _matched(reply.text, questions[row].meta["options"]):
                    matched[row] = option
        return matched


def parse(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that rules find in an answer: its letter as a word, else its text; None leaves it to the judge.

    Official rules, quirks included: exactly one of the letters A to E among the words, bare or decorated ("A.", "(A)",
    ":A" ...); a bare letter is not taken where "A" is a word of an answer of more than three (it may be an article); no
    letter is read in an answer that says NO_ANSWER.
    """
    words = [] if NO_ANSWER in answer else answer.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _DECORATIONS:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    named = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def _is_sheet(file: Path) -> bool:
    return file.suffix.lower() in (".xlsx", ".tsv", ".csv")


def _texts(file: Path) -> Iterable[tuple[str, str, Any]]:
    """(place, index, answer) of LLaVA's JSON Lines, or of the rows of a submission sheet."""
    if not _is_sheet(file):
        return llava_format.texts(file)
    try:
        text = {"dtype": str, "keep_default_na": False}  # an answer "nan" is an answer
        sheet = (
            pandas.read_excel(file, engine="openpyxl", **text)
            if file.suffix.lower() == ".xlsx"
            else pandas.read_csv(file, sep="\t" if file.suffix.lower() == ".tsv" else ",", **text)
        )
    except Exception as error:  # openpyxl and zipfile raise a dozen kinds
        raise Fault(f"{file} is not a readable sheet ({error}); give the .xlsx of a submission") from error
    if not {"index", "prediction"} <= set(sheet.columns):
        raise Fault(
            f"{file.name} has the columns {', '.join(map(str, sheet.columns))} but needs index and "
            "prediction; give the .xlsx of a submission"
        )
    rows = enumerate(zip(sheet["index"], sheet["prediction"]), 2)
    return [(f"{file.name} row {number}", name, answer) for number, (name, answer) in rows]


def _groups(questions: Sequence[Question]) -> tuple[dict[int, Question], dict[int, list[int]]]:
    """Base questions by index, and the rows of each with its rotated copies in the order of their index."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(questions)), key=lambda row: _index(questions[row])):
        rows[_index(questions[row]) % COPY].append(row)
    return {_index(question): question for question in questions if _index(question) < COPY}, dict(rows)


def _index(question: Question) -> int:
    """The table's index of a question, which is its id."""
    return int(question.id)


def _figures(questions: Sequence[Question], bases: dict[int, Question], hits: dict[int, bool]) -> dict[str, Any]:
    def share(chosen: Iterable[bool]) -> float:
        chosen = list(chosen)
        return 100 * sum(chosen) / len(chosen)

    def by(key: str) -> dict[str, float]:
        names = sorted({base.meta[key] for base in bases.values() if not _empty(base.meta[key])})
        return {name: share(hits[number] for number, base in bases.items() if base.meta[key] == name) for name in names}

    return {
        "accuracy": share(hits[number] for number in bases),
        "by_category": by("category"),
        "by_l2_category": by("l2-category"),
        "questions": len(bases),
        "rows": len(questions),
    }


def _empty(value: Any) -> bool:
    """As LLaVA's is_none: absent, NaN, "nan" or "none"."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and value.lower() in ("nan", "none"))
    )


def _image(file: Path, index: int, cells: dict[str, Any]) -> bytes:
    """The image of a row; where its cell holds the index of another row (newer tables), that row's image."""
    cell, seen = cells[str(index)], {str(index)}
    while isinstance(cell, (str, int)) and str(cell) in cells and str(cell) not in seen:
        seen.add(str(cell))
        cell = cells[str(cell)]
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Fault(f"{file.name} index {index} has no base64 image ({error}); download the table again") from error


PROMPT = """\
You match an answer with the options of a multiple-choice question. You get a question, several options and an answer, \
and say which option means most nearly the same as the answer. If no option means the same as the answer, say E. Reply \
with a single upper-case letter: A, B, C or D (if there is such an option), or E.
Example 1:
Question: Which animal is in the picture?
Options: A. horse B. goat C. sheep D. cow
Answer: a young goat
Your output: B
Example 2:
Question: Which animal is in the picture?
Options: A. horse B. goat C. sheep D. cow
Answer: A bicycle
Your output: E
Example 3:
Question: {}?
Options: {}Answer: {}
Your output: """
OPTIONS = "There are several options:\n"


def request(
    words: Mapping[str, str], name: str, question: str, options: Mapping[str, str], answer: str, attempt: int
) -> Request:
    """lmms-eval mmbench_evals.py build_prompt: temperature 0, max_tokens 256; a further attempt is a new sample."""
    listed = words["options"] + "".join(f"{letter}. {text}\n" for letter, text in options.items())
    text = words["prompt"].format(question, listed, answer)
    return Request(
        [{"role": "user", "content": text}],
        temperature=0.0,
        max_tokens=256,
        sample=attempt,
        name=name,
        reads=lambda reply: _matched(reply.text, options),
    )


def _matched(reply: str, options: Mapping[str, str]) -> str | None:
    """The option that a reply of the judge names."""
    text = reply.strip()
    return None if NO_ANSWER in text else parse(text, options)
