"""POPE: is there a dog in the image? Yes/no questions about objects that are there and objects that are not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, Strict

from povid.benchmarks import coco, yes_no
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source, paired
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = get_args(Split)
GITHUB = "https://raw.githubusercontent.com/RUCAIBox/POPE/3df3ba1b110ecce25696989577fad583b67d4239/output/coco"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
WHAT = "case and punctuation ignored, a leading yes or no decides, n't, nope, none and the like are no, empty is no"
BY_ID = "each answer to the question that its id names, where the official script counts by position"

_ASKED = re.compile(r"is there (?:an? )?(.{1,300}?) in the im", re.IGNORECASE)


class POPE(Benchmark):
    """``data`` holds any of coco_pope_{random,popular,adversarial}.json; images are by default in data/images.

    Attributes:
        suffix: appended to every question; None for SHORT_ANSWER, which LLaVA-1.5 is asked with.
        splits: None for every split whose file is there.
    """

    name: ClassVar[str] = "pope"
    official: ClassVar[str] = "RUCAIBox/POPE evaluate.py, the same as LLaVA llava/eval/eval_pope.py"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("pope.f1", "POPE", "high", 2),
        Column("pope.yes_ratio", "yes %", None, 1),
    )
    sources: ClassVar[tuple[Source, ...]] = (
        *(
            Source(f"{GITHUB}/coco_pope_{split}.json", f"coco_pope_{split}.json", size=size, sha256=sha256)
            for split, size, sha256 in (
                ("random", 368166, "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"),
                ("popular", 370190, "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753"),
                ("adversarial", 370401, "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8"),
            )
        ),
        coco.VAL2014,
    )
    notice: ClassVar[str] = (
        "If you have COCO's images elsewhere, set benchmarks.pope.images and fetch with --pictures none."
    )
    stop: ClassVar[str | None] = "."  # nothing after the first full stop is ever parsed

    max_new_tokens: int = Field(128, ge=1)
    suffix: str | None = None
    splits: Annotated[tuple[Split, ...], Strict(False), Field(min_length=1)] | None = None

    def questions(self) -> list[Question]:
        """Questions of the split files in ``data``, those about one image side by side over all splits.

        ``meta`` holds split, position in the split, question_id, label, image name and the bare question. Raises Fault
        for a missing or broken file.
        """
        data, folder = self.data, self.images or self.data / "images"
        suffix = SHORT_ANSWER if self.suffix is None else self.suffix
        chosen = self.splits or self.present()
        unified = _llava_ids(data / "llava_pope_test.jsonl") if (data / "llava_pope_test.jsonl").is_file() else {}
        by_image: dict[str, list[Question]] = {}
        for split in chosen:
            for position, row in enumerate(rows(data / f"coco_pope_{split}.json")):
                meta = {"split": split, "position": position, "question": row["text"]} | {
                    key: row[key] for key in ("question_id", "label", "image")
                }
                if split in unified and position < len(unified[split]):
                    meta["llava_id"] = unified[split][position]
                question = Question(
                    f"{split}/{row['question_id']}",
                    coco.picture(folder, row["image"]),
                    row["text"] + suffix,
                    meta,
                )
                by_image.setdefault(row["image"], []).append(question)
        return [question for questions in by_image.values() for question in questions]

    def present(self) -> tuple[Split, ...]:
        """The splits whose question files are in ``data``, in the official order. Raises Fault if there is none."""
        found = tuple(split for split in SPLITS if (self.data / f"coco_pope_{split}.json").is_file())
        if not found:
            raise Fault(
                f"{self.data} holds none of coco_pope_{{random,popular,adversarial}}.json; put POPE's output/coco "
                f"files there or run `python -m povid.benchmarks fetch pope --data {self.data}`"
            )
        return found

    def for_answers(self, file: Path) -> POPE:
        """The splits that an answer file (or a folder of one file per split) is about; Fault if that is unclear."""
        return self.changed(splits=self._answered(Path(file)))

    def _answered(self, file: Path) -> tuple[Split, ...]:
        there = self.present()
        if file.is_dir():
            return tuple(split for split in there if any(split in path.name for path in file.iterdir())) or there
        named: tuple[Split, ...] = tuple(split for split in there if split in file.name)
        records = _answers(file)
        splits = _by_split(self.questions())
        expected = [splits] if self.limit is None else [_by_split(self.loaded()), splits]
        if len(there) == 1 or any(len(records) == sum(map(len, each.values())) for each in expected):
            return there
        if len(named) == 1:
            return named
        homes = _homes(records, splits)
        if None not in homes:
            return tuple(split for split in there if split in homes)
        fitting: tuple[Split, ...] = tuple(
            split for split in there if any(_fits(records, each.get(split, ())) for each in expected)
        )
        if len(fitting) == 1:
            return fitting
        counts = ", ".join(f"{split} {len(asked)}" for split, asked in splits.items())
        if len(records) not in map(len, splits.values()):
            raise Fault(
                f"{file.name} has {len(records)} answers{_old(records)}, but the splits in {self.data} have {counts} "
                "questions; every question needs exactly one answer, made with the same version of the questions"
            )
        raise Fault(
            f"{file.name} has {len(records)} answers but does not say of which split, while {self.data} has {counts} "
            "questions; put the split's name into the file's name, or answers of all splits into one file"
        )

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions.

        ``file``: POPE's or LLaVA's records for one split, LLaVA's for all of them (with llava_pope_test.jsonl among the
        data, or the question in "prompt"), our own, or a folder with a file per split whose name contains the split's.
        Officially answers count by position; here ids and questions that the records carry must agree with it, and a
        complete set of ids in another order is put in order. Raises Fault if answers are missing, too many or
        ambiguous.
        """
        splits = _by_split(questions)
        matched = {
            question.id: answer
            for split, part in _parts(Path(file), splits).items()
            for question, answer in zip(splits[split], _match(*part, splits[split]))
        }
        return [matched[question.id] for question in questions]

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """What evaluate.py reads for each split, and LLaVA's question and answer files for all splits.

        evaluate.py reads {"question", "answer"}; eval_pope.py takes the others as --question-file and --result-file.
        """
        given = {question.id: answer for question, answer in zip(questions, answers, strict=True)}
        asked_lines, answer_lines = [], []
        for split, asked in _by_split(questions).items():
            rows = [{"question": question.meta["question"], "answer": given[question.id]} for question in asked]
            write_text(folder / f"coco_pope_{split}_answers.json", "".join(json.dumps(row) + "\n" for row in rows))
            for question in asked:
                row = {
                    "question_id": len(asked_lines),
                    "image": question.meta["image"],
                    "text": question.text,
                    "category": split,
                }
                asked_lines.append(json.dumps(row))
                answer_lines.append(
                    json.dumps(
                        {
                            "question_id": row["question_id"],
                            "prompt": question.text,
                            "text": given[question.id],
                            "answer_id": question.id,
                            "model_id": "povid",
                            "metadata": {},
                        }
                    )
                )
        write_text(folder / "llava_pope_test.jsonl", "\n".join(asked_lines) + "\n")
        return write_text(folder / "llava_answers.jsonl", "\n".join(answer_lines) + "\n")

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """The figures of the official script, which counts answers by position, whatever ids they carry.

        Our own ids ("random/1"), which it does not know, are followed. Where official ids say another order, or that
        some questions have no answer, "by_id" holds the figures of the answers as their ids say. Raises Fault where
        ``read_answers`` does, except for answers that are missing by their ids.
        """
        try:
            by_position, by_id, moved = _paired(Path(file), questions)
        except Fault:
            if self.limited is None:
                raise
            asked = {question.id for question in questions}  # the file may answer all questions
            *both, moved = _paired(Path(file), self.questions())
            by_position, by_id = ([pair for pair in pairs if pair[0].id in asked] for pairs in both)
        score = self.score(*_columns(by_position))
        if moved:
            asked_by_id, answers = _columns(by_id)
            said = ["no" if says_no(answer) else "yes" for answer in answers]
            score.scores["by_id"] = all_figures(asked_by_id, said) | {"what": BY_ID}
        return score

    def notes(self, score: Score) -> list[str]:
        """That answers are invalid, and that the file's order is not that of the questions."""
        notes = yes_no.notes(score.scores, "officially they count as yes")
        if "by_id" not in score.scores:
            return notes
        return [
            *notes,
            "the answers' ids are in another order than the questions, or some are missing; the official script counts "
            "answers by position, so its figures are of answers to other questions: by_id has the right ones "
            f"(F1 {score.scores['by_id']['f1']:.2f})",
        ]

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Per split accuracy, precision, recall, F1 and yes ratio in percent, and their means over the splits.

        Headline "f1" is the mean of the splits' F1, as LLaVA and POVID report it. Yes is the positive class; a
        precision or F1 of nothing is 0 where the official script divides by zero. "corrected" holds the same by a
        parser without the official one's blind spots. "invalid" is the share of answers that say neither yes nor no to
        a reader (officially they count as yes), "f1_valid" the F1 of the others as a reader takes them. Records: split,
        question_id, image, label, parsed, correct, verdict, parsed_corrected.
        """
        official = ["no" if says_no(answer) else "yes" for answer in answers]
        corrected = ["no" if says_no_corrected(answer) else "yes" for answer in answers]
        scores: dict[str, Any] = all_figures(questions, official)
        add_valid(scores, questions, answers)
        scores["corrected"] = all_figures(questions, corrected) | {"what": WHAT}
        records = [
            record(question, answer, parsed) | {"parsed_corrected": other}
            for question, answer, parsed, other in zip(questions, answers, official, corrected, strict=True)
        ]
        return Score(scores, records)


def record(question: Question, answer: str, parsed: str | None) -> dict[str, Any]:
    """What was decided for an answer that the official rule takes for ``parsed``."""
    label, image, said = question.meta["label"], question.meta["image"], yes_no.verdict(answer)
    sums = {
        "f1": yes_no.f1_terms(parsed, label),
        "accuracy": [int(parsed == label), int(parsed is not None)],
        "yes_ratio": [int(parsed == "yes"), int(parsed is not None)],
        "invalid": [int(said is None), 1],
        "f1_valid": yes_no.f1_terms(said, label),
    }
    return {key: question.meta[key] for key in ("split", "question_id", "image", "label")} | {
        "parsed": parsed,
        "correct": parsed == label,
        "verdict": said,
        "paired": paired(image, sums, question.meta["split"]),
    }


def add_valid(scores: dict[str, Any], questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Add ``invalid`` and ``f1_valid`` to the figures of every split, and their means over the splits."""
    given: dict[str, list[tuple[str | None, str]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        given.setdefault(question.meta["split"], []).append((yes_no.verdict(answer), question.meta["label"]))
    found = {
        split: yes_no.valid([said for said, _ in pairs], [label for _, label in pairs])
        for split, pairs in given.items()
    }
    for split, figures in found.items():
        scores[split] |= figures
    scores |= {key: sum(figures[key] for figures in found.values()) / len(found) for key in ("invalid", "f1_valid")}


def rows(file: Path) -> list[dict[str, Any]]:
    """The questions of one split's file. Raises Fault for a record that is none, and for an id that is there twice."""
    found, seen = [], set()
    for place, row in read_records(file):
        if not isinstance(row, dict) or not {"question_id", "image", "text", "label"} <= row.keys():
            raise Fault(f"{place} is not a POPE question; each has question_id, image, text and label")
        if row["label"] not in ("yes", "no"):
            raise Fault(f'{place} has label {row["label"]!r}; POPE\'s labels are "yes" and "no"')
        if row["question_id"] in seen:
            raise Fault(f"{place} repeats question_id {row['question_id']!r}; every question of a split has its own")
        seen.add(row["question_id"])
        found.append(row)
    if not found:
        raise Fault(f"{file} holds no question; download it again")
    return found


def _llava_ids(file: Path) -> dict[str, list[int | str]]:
    """Split → the ids that LLaVA's one question file for all splits gives its questions, in order."""
    ids: dict[str, list[int | str]] = {}
    for place, row in read_records(file):
        if not isinstance(row, dict) or not {"question_id", "category"} <= row.keys():
            raise Fault(f"{place} has no question_id and category; use LLaVA's own llava_pope_test.jsonl or remove it")
        ids.setdefault(row["category"], []).append(row["question_id"])
    return ids


def says_no(text: str) -> bool:
    """The official parser: a word "No", "not" or "no" before the first full stop; anything else is a yes.

    Commas vanish and only single spaces separate words, so "NO", "No\\n", "none", "isn't" and "" are all yes.
    """
    return not {"No", "not", "no"}.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def says_no_corrected(text: str) -> bool:
    """What a reader would understand as a no (see ``WHAT``), still from the first sentence alone."""
    words = yes_no.words_of(yes_no.first_sentence(text))
    if not words or words[0] in ("yes", "no"):
        return not words or words[0] == "no"
    return yes_no.negates(words)


def _answers(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) with the answer under "answer": POPE's {"question", "answer"} or LLaVA's {..., "text"}."""
    found = []
    for place, record in read_records(file):
        key = next((key for key in ("answer", "text") if isinstance(record, dict) and key in record), None)
        if key is None or not isinstance(record[key], str):
            raise Fault(f'{place} has no answer: "answer" (POPE) or "text" (LLaVA) must be a string')
        found.append((place, record | {"answer": record[key]}))
    return found


def _object(text: Any) -> str | None:
    """The object that a question asks for; None where it is worded otherwise."""
    asked = _ASKED.search(text) if isinstance(text, str) else None
    return asked[1].lower() if asked else None


def _asks(record: Mapping[str, Any]) -> str | None:
    return _object(record.get("question", record.get("prompt")))


def _by_split(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Split → its questions in the order of its file."""
    table: dict[str, list[Question]] = {}
    for question in questions:
        table.setdefault(question.meta["split"], []).append(question)
    return {
        split: sorted(table[split], key=lambda question: question.meta["position"])
        for split in SPLITS
        if split in table
    }


def _fits(records: Sequence[tuple[str, Mapping[str, Any]]], asked: Sequence[Question]) -> bool:
    objects = [_asks(record) for _, record in records]
    return None not in objects and objects == [_object(question.meta["question"]) for question in asked]


def _only_file(folder: Path, split: str) -> Path:
    files = sorted(path for path in folder.iterdir() if split in path.name and not path.name.startswith("."))
    if len(files) != 1:
        raise Fault(f"{folder} has {len(files)} files with {split!r} in their names; leave one answer file per split")
    return files[0]


def _divide(
    file: Path, records: list[tuple[str, dict[str, Any]]], splits: Mapping[str, Sequence[Question]]
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """One file about several splits, divided among them by category, by id, or by what consecutive answers ask."""
    homes = _homes(records, splits)
    if None not in homes:
        return {name: [pair for pair, split in zip(records, homes) if split == name] for name in splits}
    counts = ", ".join(f"{split} {len(asked)}" for split, asked in splits.items())
    if len(records) != sum(map(len, splits.values())):
        raise Fault(
            f"{file.name} has {len(records)} answers, but the splits have {counts} questions; "
            "an answer file made with another version of POPE cannot be scored against these labels"
        )
    divided, rest = {}, records
    while rest:
        found = next(
            (split for split, asked in splits.items() if split not in divided and _fits(rest[: len(asked)], asked)),
            None,
        )
        if found is None:
            raise Fault(
                f"{rest[0][0]} starts answers whose split is unclear; put llava_pope_test.jsonl among the "
                f"data, or score a file of answers per split ({counts} questions)"
            )
        divided[found], rest = rest[: len(splits[found])], rest[len(splits[found]) :]
    return divided


def _homes(records: Sequence[tuple[str, Mapping[str, Any]]], splits: Mapping[str, Sequence[Question]]) -> list[Any]:
    """The split of each answer by its category or its id; None where neither says."""
    known = {
        str(question.meta["llava_id"]): split
        for split, asked in splits.items()
        for question in asked
        if "llava_id" in question.meta
    }
    known |= {str(question.id): split for split, asked in splits.items() for question in asked}
    found = [record.get("category", known.get(str(record.get("question_id")))) for _, record in records]
    return [split if isinstance(split, str) and split in splits else None for split in found]


def _old(*lists: Sequence[Any]) -> str:
    return " (2910 is the older random split)" if 2910 in map(len, lists) else ""


def _parts(
    file: Path, splits: Mapping[str, Sequence[Question]]
) -> dict[str, tuple[Path, list[tuple[str, dict[str, Any]]]]]:
    """Split → the file with its answers, and the answers in the file's order."""
    if file.is_dir():
        files = {split: _only_file(file, split) for split in splits}
        return {split: (part, _answers(part)) for split, part in files.items()}
    records = _answers(file)
    divided = _divide(file, records, splits) if len(splits) > 1 else dict.fromkeys(splits, records)
    return {split: (file, divided[split]) for split in splits}


def _places(records: Sequence[tuple[str, Mapping[str, Any]]], asked: Sequence[Question]) -> list[int] | None:
    """Which question each answer is for by its id; None unless all ids are different ones of these questions."""
    ids = [str(record.get("question_id")) for _, record in records]
    for known in (
        [str(question.meta.get("llava_id")) for question in asked],
        [str(question.id) for question in asked],
        [str(question.meta["question_id"]) for question in asked],
    ):
        place = {one: i for i, one in enumerate(known)}
        if len(place) == len(known) and len(set(ids)) == len(ids) and place.keys() >= set(ids):
            return [place[one] for one in ids]
    return None


def _paired(
    file: Path, questions: Sequence[Question]
) -> tuple[list[tuple[Question, str]], list[tuple[Question, str]], bool]:
    """(question, answer) by position and by id, and whether the two differ."""
    by_position, by_id, moved = [], [], False
    splits = _by_split(questions)
    for split, (where, records) in _parts(file, splits).items():
        asked = splits[split]
        places = _places(records, asked)
        own = {str(record.get("question_id")) for _, record in records} <= {str(question.id) for question in asked}
        if own or places is None or places == list(range(len(asked))):
            pairs = list(zip(asked, _match(where, records, asked)))
            by_position += pairs
            by_id += pairs
        else:
            _check_asked(records, [asked[place] for place in places], split)
            by_position += [(asked[i], record["answer"]) for i, (_, record) in enumerate(records)]
            by_id += [(asked[place], record["answer"]) for place, (_, record) in zip(places, records)]
            moved = True
    return by_position, by_id, moved


def _match(file: Path, records: list[tuple[str, dict[str, Any]]], asked: Sequence[Question]) -> list[str]:
    """The answers of one split in the order of its questions."""
    split = asked[0].meta["split"]
    if len(records) != len(asked):
        raise Fault(
            f"{file.name} has {len(records)} answers, but coco_pope_{split}.json has {len(asked)} questions"
            f"{_old(records, asked)}; every question needs exactly one answer, made with the same version of "
            "the questions"
        )
    if all("question_id" in record for _, record in records):
        ids = [str(record["question_id"]) for _, record in records]
        if len(set(ids)) < len(ids):
            twice = next(i for i, one in enumerate(ids) if one in ids[:i])
            raise Fault(f"{records[twice][0]} answers question_id {ids[twice]!r} a second time; keep one answer each")
        places = _places(records, asked)
        if places is not None:
            records = [pair for _, pair in sorted(zip(places, records), key=lambda one: one[0])]
        elif wrong := next((i for i in range(1, len(ids)) if not _rises(ids[i - 1], ids[i])), None):
            raise Fault(
                f"{records[wrong][0]} has question_id {ids[wrong]!r} after {ids[wrong - 1]!r}, and "
                f"coco_pope_{split}.json does not have these ids: answers count by position, so write them in "
                "the order of the questions"
            )
    _check_asked(records, asked, split)
    return [record["answer"] for _, record in records]


def _check_asked(records: Sequence[tuple[str, Mapping[str, Any]]], asked: Sequence[Question], split: str) -> None:
    """Raise Fault for an answer that repeats a question other than the one it is taken for."""
    for (where, record), question in zip(records, asked):
        if _asks(record) is not None and _asks(record) != _object(question.meta["question"]):
            raise Fault(
                f"{where} answers {record.get('question', record.get('prompt'))!r:.80}, but question "
                f"{question.meta['question_id']} of coco_pope_{split}.json asks {question.meta['question']!r}; "
                "write the answers in the order of the questions"
            )


def _rises(before: str, after: str) -> bool:
    return before.isdecimal() and after.isdecimal() and int(before) < int(after)


def all_figures(questions: Sequence[Question], said: Sequence[str | None]) -> dict[str, Any]:
    """The figures of each split and their means over the splits; ``said``: yes or no, or None for what is left out."""
    pairs: dict[str, list[tuple[bool, bool]]] = {question.meta["split"]: [] for question in questions}
    for question, one in zip(questions, said, strict=True):
        if one is not None:
            pairs[question.meta["split"]].append((one == "yes", question.meta["label"] == "yes"))
    by_split = {split: _figures(pairs[split]) for split in SPLITS if split in pairs}
    means = {
        key: sum(figures[key] for figures in by_split.values()) / len(by_split)
        for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")
    }
    return means | by_split


def _figures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | int]:
    """Figures of (said yes, is yes) pairs, in percent; 0 where there is no pair."""
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "accuracy": 100 * (tp + tn) / (len(pairs) or 1),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * f1,
        "yes_ratio": 100 * (tp + fp) / (len(pairs) or 1),
        "questions": len(pairs),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def _columns(pairs: list[tuple[Question, str]]) -> tuple[list[Question], list[str]]:
    """(question, answer) pairs as questions and answers."""
    return [question for question, _ in pairs], [answer for _, answer in pairs]
