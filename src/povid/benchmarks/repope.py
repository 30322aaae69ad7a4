"""RePOPE: POPE's questions with corrected labels, without those whose answer is ambiguous. POPE's answers serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from povid.benchmarks import yes_no
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source
from povid.benchmarks.pope import POPE, SPLITS, Split, add_valid, all_figures, record, rows
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

_HOST = "https://raw.githubusercontent.com/YanNeu/RePOPE/bcf22e5690d587cce34e1728af3efdcfaf747d29/annotations"


class RePOPE(POPE):
    """``data`` holds coco_repope_{random,popular,adversarial}.json, any of them, beside POPE's own coco_pope files."""

    name: ClassVar[str] = "repope"
    official: ClassVar[str] = "YanNeu/RePOPE src/eval_utils.py"
    columns: ClassVar[tuple[Column, ...]] = (Column("repope.f1", "RePOPE", "high", 2),)
    sources: ClassVar[tuple[Source, ...]] = (
        *(
            Source(f"{_HOST}/coco_repope_{split}.json", f"coco_repope_{split}.json", size, sha256)
            for split, size, sha256 in (
                ("random", 340368, "f464fcaf60b24ce2f280cf33f122e000dbdd35c8e88f77c4141c9c2cba864611"),
                ("popular", 333773, "57832b055bae5fd6176278a4f104c98ddd84811f7d26dfcb93d481f6c9da09a5"),
                ("adversarial", 328764, "8c346dbb060bf422ff92e769fa68e5ab3e8a777cb28a26e973387441e05c9ccf"),
            )
        ),
        *POPE.sources,
    )
    notice: ClassVar[str] = (
        "If you have COCO's images elsewhere, set benchmarks.repope.images and fetch with --pictures none."
    )
    again: ClassVar[type[Benchmark] | None] = POPE

    def questions(self) -> list[Question]:
        """POPE's questions that RePOPE keeps, in POPE's order, with RePOPE's labels.

        Raises Fault where a file is missing or broken, or where the two disagree about what a question asks.
        """
        asked = super().questions()
        labels: dict[str, tuple[str, str, str]] = {}
        for split in dict.fromkeys(question.meta["split"] for question in asked):
            for row in rows(self.data / f"coco_repope_{split}.json"):
                labels[f"{split}/{row['question_id']}"] = (row["text"], row["image"], row["label"])
        kept = []
        for question in asked:
            text, image, label = labels.pop(str(question.id), ("", "", ""))
            if label and (text, image) != (question.meta["question"], question.meta["image"]):
                raise _other_version(self.data, str(question.id))
            if label:
                kept.append(Question(question.id, question.image, question.text, {**question.meta, "label": label}))
        if labels:
            raise _other_version(self.data, min(labels))
        return kept

    def present(self) -> tuple[Split, ...]:
        """The splits whose files, POPE's and RePOPE's, are in ``data``. Raises Fault if there is none."""
        found = tuple(
            split
            for split in SPLITS
            if all((self.data / f"coco_{kind}_{split}.json").is_file() for kind in ("pope", "repope"))
        )
        if not found:
            raise Fault(
                f"{self.data} holds no coco_repope_SPLIT.json beside POPE's coco_pope_SPLIT.json (random, popular or "
                f"adversarial); run `python -m povid.benchmarks fetch repope --data {self.data}`"
            )
        return found

    def for_answers(self, file: Path) -> RePOPE:
        """The splits that an answer file is about, be it to POPE's questions or to RePOPE's alone."""
        known = _by_id(Path(file), self._pope().questions())
        if known is None:
            return self.changed(splits=self._pope().for_answers(file).splits)
        return self.changed(splits=tuple(split for split in SPLITS if any(one.startswith(split) for one in known)))

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions, from every file that POPE reads; those to other questions are unused.

        Also read: files of ours that answer RePOPE's questions alone, and the official {split: {question_id: {...,
        "response"}}}. Raises Fault for a question without an answer, and where POPE does.
        """
        file, pope = Path(file), self._pope()
        asked = pope.changed(splits=tuple(dict.fromkeys(question.meta["split"] for question in questions))).questions()
        known = _by_id(file, asked)
        if known is None:
            known = {str(one.id): text for one, text in zip(asked, pope.read_answers(file, asked), strict=True)}
        if missing := [question.id for question in questions if str(question.id) not in known]:
            raise Fault(
                f"{file} has no answer to {len(missing)} of {len(questions)} questions, the first is {missing[0]!r}; "
                "answer all of RePOPE's questions, or all of POPE's"
            )
        return [known[str(question.id)] for question in questions]

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """The score by the questions' ids, as officially."""
        return self.score(questions, self.read_answers(file, questions), judge)

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """repope_answers.json, what the official script writes beside its results."""
        given: dict[str, dict[str, Any]] = {}
        for question, answer in zip(questions, answers, strict=True):
            meta = question.meta
            given.setdefault(meta["split"], {})[str(meta["question_id"])] = {
                "question_id": str(meta["question_id"]),
                "text": meta["question"],
                "label": meta["label"],
                "dataset": meta["split"],
                "response": answer,
                "answer": parse(answer),
            }
        return write_text(folder / "repope_answers.json", json.dumps(given, indent=4))

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Per split what POPE reports, on RePOPE's labels and by RePOPE's parser, and the means over the splits.

        An answer that holds neither the letters yes nor no leaves every figure and is counted in "unparsed". "invalid"
        and "f1_valid" are POPE's. Records: as POPE's.
        """
        parsed = [parse(answer) for answer in answers]
        scores: dict[str, Any] = all_figures(questions, parsed)
        scores["unparsed"] = parsed.count(None)
        add_valid(scores, questions, answers)
        return Score(scores, [record(*one) for one in zip(questions, answers, parsed, strict=True)])

    def notes(self, score: Score) -> list[str]:
        """That answers are invalid."""
        return yes_no.notes(score.scores, "officially, those without the letters yes or no are left out")

    def _pope(self) -> POPE:
        return POPE(data=self.data, images=self.images, suffix=self.suffix, splits=self.splits or self.present())


def parse(answer: str) -> str | None:
    """The official rule: "yes" if these letters are anywhere in the answer, else "no" if these are, else None."""
    lower = answer.lower()
    return "yes" if "yes" in lower else "no" if "no" in lower else None


def _by_id(file: Path, asked: Sequence[Question]) -> dict[str, str] | None:
    """POPE's id → answer, from the official layout or from records with our own ids; None for any other file."""
    if file.is_dir():
        return None
    records = read_records(file)
    if len(records) == 1 and isinstance(records[0][1], dict) and set(records[0][1]) <= set(SPLITS):
        found = {}
        for split, answers in records[0][1].items():
            for number, answer in answers.items() if isinstance(answers, dict) else ():
                if not isinstance(answer, dict) or not isinstance(answer.get("response"), str):
                    raise Fault(f'{file} has no text under {split}, {number}, "response"; write the answer there')
                found[f"{split}/{number}"] = answer["response"]
        return found
    ids = {str(question.id) for question in asked}
    texts: dict[str, str] = {}
    for place, row in records:
        if not isinstance(row, dict) or str(row.get("question_id")) not in ids:
            return None
        if not isinstance(row.get("text"), str):
            raise Fault(f'{place} has {row.get("text")!r:.60} as its "text", needed the answer; correct that record')
        if str(row["question_id"]) in texts:
            raise Fault(f"{place} answers {row['question_id']!r} a second time; keep one answer each")
        texts[str(row["question_id"])] = row["text"]
    return texts


def _other_version(data: Path, question: str) -> Fault:
    return Fault(
        f"{data}: POPE's and RePOPE's files ask different things under {question!r}, so they are of different "
        f"versions; run `python -m povid.benchmarks fetch repope --data {data}` into an empty folder"
    )
