"""AMBER: descriptions of images, and yes/no questions about the existence, attributes and relations of objects."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, Strict

from povid.benchmarks import llava_format, yes_no
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source, paired
from povid.benchmarks.chair_words import word_tokenize
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

Task = Literal["generative", "existence", "attribute", "relation"]
TASKS: tuple[Task, ...] = get_args(Task)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
VECTORS = "en_core_web_lg"
SIMILAR = 0.8  # cosine above which a noun stands for an annotated object
START = 0.001  # metrics.txt starts every denominator here
WHAT = "an answer counts as a reader takes it; officially only the answers Yes and No themselves do"
CURE = (
    f"install spaCy (`pip install 'povid[amber]'`) and run `python -m spacy download {VECTORS}` and "
    "`python -m nltk.downloader averaged_perceptron_tagger_eng wordnet`, or in a run leave out the descriptions with "
    "benchmarks.amber.tasks=[existence,attribute,relation]"
)

# What annotations.json calls the questions: task, and the name of the attribute.
TYPES: dict[str, tuple[Task, str]] = {
    "generative": ("generative", ""),
    "discriminative-hallucination": ("existence", ""),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", ""),
    "relation": ("relation", ""),
}
_HOST = "https://raw.githubusercontent.com/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data"


class AMBER(Benchmark):
    """``data`` holds annotations.json, relation.json, safe_words.txt and query/query_all.json; images in data/images.

    The descriptions (task ``generative``) are scored with NLTK's tagger and WordNet and with spaCy's word vectors, none
    of which comes with this package.

    Attributes:
        tasks: None for all of them.
        suffix: appended to the yes/no questions; None for SHORT_ANSWER, which LLaVA-1.5 is asked with. The official
            files have none, but only the answers Yes and No themselves count.
    """

    name: ClassVar[str] = "amber"
    official: ClassVar[str] = "junyangwang0410/AMBER inference.py"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("amber.CHAIR", "AMBER", "low", 1, "CHAIR"),
        Column("amber.cover", "AMBER", "high", 1, "cover"),
        Column("amber.hal", "AMBER", "low", 1, "hal"),
        Column("amber.cog", "AMBER", "low", 1, "cog"),
        Column("amber.f1", "AMBER", "high", 1, "F1"),
        Column("amber.score", "AMBER", "high", 1),
    )
    sources: ClassVar[tuple[Source, ...]] = tuple(
        Source(f"{_HOST}/{file}", file, size, sha256)
        for file, size, sha256 in (
            ("annotations.json", 1813301, "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797"),
            ("relation.json", 12699, "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e"),
            ("safe_words.txt", 57, "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043"),
            ("query/query_all.json", 1844750, "127680ae61f7d4a92d2f7f07a8deaec07f0689b194d2c7c0f41ead7bd2c5bcf5"),
        )
    )
    notice: ClassVar[str] = (
        "The images AMBER_1.jpg to AMBER_1004.jpg are left to you: get them by the link in the readme of "
        "https://github.com/junyangwang0410/AMBER and put them into {data}/images; answers can be scored without them. "
        f"To score descriptions, {CURE.partition(', or')[0]}."
    )

    tasks: Annotated[tuple[Task, ...], Strict(False), Field(min_length=1)] | None = None
    suffix: str | None = None

    def questions(self) -> list[Question]:
        """The questions of the chosen tasks in the order of query_all.json.

        ``meta``: image (its name), task, attribute, truth (yes or no, or the objects), and for descriptions hallu (the
        objects that a model may imagine), association and safe. Raises Fault for a missing or broken file, and, with
        descriptions among the tasks, where what scores them is not installed.
        """
        chosen, folder = self.tasks or TASKS, self.images or self.data / "images"
        annotations = self._annotations()
        association, safe = self._association()
        suffix = SHORT_ANSWER if self.suffix is None else self.suffix
        found = []
        for place, row in read_records(llava_format.needed(self, ["query/query_all.json", "query_all.json"])):
            number, image, text = llava_format.fields(place, row, "id", "image", "query")
            if number not in annotations:
                raise Fault(f"{place} asks question {number!r}, which annotations.json does not have; {_again(self)}")
            kind, truth, hallu = annotations[number]
            task, attribute = TYPES[kind]
            if task not in chosen:
                continue
            meta: dict[str, Any] = {"image": image, "task": task, "attribute": attribute, "truth": truth}
            if task == "generative":
                if unknown := [word for word in (*truth, *hallu) if word not in association]:
                    raise Fault(
                        f"question {number} is annotated with {unknown[0]!r}, which relation.json lacks; {_again(self)}"
                    )
                meta |= {"hallu": hallu, "association": association, "safe": safe}
            picture = llava_format.picture([folder, self.data / "image"], [image])
            found.append(Question(number, picture, text if task == "generative" else text + suffix, meta))
        if "generative" in chosen:
            _check_language()
        return found

    def _annotations(self) -> dict[int, tuple[str, Any, list[str]]]:
        """Question → (type, truth, objects that may be imagined)."""
        found = {}
        for place, row in read_records(llava_format.needed(self, ["annotations.json"])):
            number, kind, truth = llava_format.fields(place, row, "id", "type", "truth")
            generative = kind == "generative"
            if kind not in TYPES or not (isinstance(truth, list) if generative else truth in ("yes", "no")):
                raise Fault(
                    f"{place} is of type {kind!r} with truth {truth!r:.60}, which is not AMBER's; {_again(self)}"
                )
            found[number] = (kind, truth, llava_format.fields(place, row, "hallu")[0] if generative else [])
        return found

    def _association(self) -> tuple[dict[str, list[str]], list[str]]:
        """relation.json (object → other words for it) and safe_words.txt (words that never count as hallucinated)."""
        records = read_records(llava_format.needed(self, ["relation.json"]))
        if len(records) != 1 or not isinstance(records[0][1], dict):
            raise Fault(f"{self.data / 'relation.json'} is not one object of words and their lists; {_again(self)}")
        safe = llava_format.needed(self, ["safe_words.txt"]).read_text(encoding="utf-8")
        return records[0][1], safe.split("\n")

    def for_answers(self, file: Path) -> AMBER:
        """The tasks that an answer file is about."""
        annotations, asked = self._annotations(), {number for _, number, _ in _responses(file)}
        tasks = {TYPES[kind][0] for number, (kind, _, _) in annotations.items() if str(number) in asked}
        return self.changed(tasks=tuple(task for task in TASKS if task in tasks) or None)

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers from the official list of {"id", "response"} or from LLaVA's records, in any order."""
        return llava_format.in_order(file, _responses(file), questions)

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """responses.json, which inference.py takes as --inference_data."""
        rows = [{"id": question.id, "response": text} for question, text in zip(questions, answers, strict=True)]
        return write_text(folder / "responses.json", json.dumps(rows, indent=1))

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """The official figures in percent, rounded to one decimal as officially, for the tasks that were asked.

        Descriptions: CHAIR (hallucinated nouns), cover (annotated objects that are named), hal (descriptions with a
        hallucinated noun), cog (of the objects that a model may imagine, those it names). Yes/no questions: accuracy,
        and precision, recall and f1 with no as the positive class, for each task, for each attribute and, of all three
        tasks, at the top. "score" is the AMBER score, the mean of 100 - CHAIR and f1.

        Beside them: "CHAIR_distinct" and "repeat_rate" as in CHAIR, "invalid" and "f1_valid" as in POPE, "unmatched",
        the share of answers other than Yes and No themselves, which are officially wrong, and "corrected", where they
        count as a reader takes them. Records: id, image, task, and nouns and hallucinated or label, answer and correct.
        """
        scores: dict[str, Any] = {}
        records = []
        for question, answer in zip(questions, answers, strict=True):
            given = _described if question.meta["task"] == "generative" else _answered
            records.append({"id": question.id, "image": question.meta["image"]} | given(question, answer))
        told = [record for record in records if record["task"] == "generative"]
        said = [record for record in records if record["task"] != "generative"]
        if told:
            scores |= _description_figures(told)
        if {record["task"] for record in said} == set(TASKS[1:]):
            scores |= _yes_no_figures(said)
        if "CHAIR" in scores and "f1" in scores:
            scores["score"] = (100 - scores["CHAIR"] + scores["f1"]) / 2
        for task in TASKS[1:]:
            if of_task := [record for record in said if record["task"] == task]:
                scores[task] = _yes_no_figures(
                    of_task,
                    extra=0.001 if task == "existence" else 0.0001,
                    start=3 * START if task == "attribute" else START,
                )
        for attribute in ("state", "number", "action"):
            if of_attribute := [record for record in said if record["attribute"] == attribute]:
                scores[attribute] = _yes_no_figures(of_attribute)
        if said:
            labels, verdicts = [record["label"] for record in said], [record["verdict"] for record in said]
            scores |= yes_no.valid(verdicts, labels, positive="no")
            scores["unmatched"] = 100 * sum(record["answer"] not in ("Yes", "No") for record in said) / len(said)
            scores["corrected"] = _yes_no_figures(said, key="verdict") | {"what": WHAT}
        return Score(scores | {"descriptions": len(told), "questions": len(said)}, records)

    def notes(self, score: Score) -> list[str]:
        """That answers are invalid, or are not the words that count officially."""
        scores = score.scores
        if "unmatched" not in scores or scores["unmatched"] <= yes_no.FEW:
            return []
        return [
            *yes_no.notes(scores, "officially they are wrong"),
            f"{scores['unmatched']:.1f} % of the answers are not Yes or No themselves, so that officially they are "
            f"wrong; as a reader takes them, F1 is {scores['corrected']['f1']:.1f}",
        ]


def _responses(file: Path) -> list[tuple[str, str, Any]]:
    """(place, id, answer) of the official layout or of LLaVA's."""
    records = read_records(Path(file))
    official = bool(records) and isinstance(records[0][1], dict) and "response" in records[0][1]
    key, text = ("id", "response") if official else ("question_id", "text")
    return list(llava_format.texts(Path(file), key=key, text=text))


def _described(question: Question, answer: str) -> dict[str, Any]:
    """What is found in a description.

    A noun of relation.json counts as hallucinated unless it is a safe word, one of the annotated objects or their other
    words, or similar to one of these. The first match says which object is named. So it is for the objects that a model
    may imagine, similar ones included; naming one of them does not make a noun hallucinated, nor keep it from being so.
    """
    meta = question.meta
    association: Mapping[str, list[str]] = meta["association"]
    known = association.keys() | {word for words in association.values() for word in words}
    there, imagined = (
        [(word, i) for i, name in enumerate(names) for word in association[name]] + list(zip(names, range(len(names))))
        for names in (meta["truth"], meta["hallu"])
    )
    found = [noun for noun in nouns(answer) if noun in known]
    covered: set[int] = set()
    cognitive: set[int] = set()
    wrong = []
    for noun in found:
        if noun in meta["safe"]:
            continue
        if place := [i for word, i in there if word == noun][:1]:
            covered.update(place)
            continue
        named = [i for word, i in imagined if word == noun][:1]
        cognitive.update(named, _similar(noun, imagined))
        if place := _similar(noun, there):
            covered.update(place)
        else:
            wrong.append(noun)
    sums = {
        "CHAIR": [len(wrong), len(found)],
        "cover": [len(covered), len(meta["truth"])],
        "hal": [int(bool(wrong)), 1],
        "cog": [len(cognitive), len(meta["hallu"])],
        "CHAIR_distinct": [len(set(wrong)), len(set(found))],
        "repeat_rate": [len(found) - len(set(found)), len(found)],
    }
    return {"task": "generative", "nouns": found, "hallucinated": wrong, "paired": paired(meta["image"], sums)}


def _similar(noun: str, objects: Sequence[tuple[str, int]]) -> list[int]:
    """The place of the first object with a similar word, if there is one."""
    return list(itertools.islice((i for word, i in objects if similarity(noun, word) > SIMILAR), 1))


def _answered(question: Question, answer: str) -> dict[str, Any]:
    """What is decided about an answer to a yes/no question; the official rule takes it as it stands."""
    meta, said = question.meta, yes_no.verdict(answer)
    label = meta["truth"]
    official = {"Yes": "yes", "No": "no"}.get(answer, "other")
    sums = {
        "accuracy": [int(official == label), 1],
        "f1": yes_no.f1_terms(official, label, positive="no"),
        "invalid": [int(said is None), 1],
        "f1_valid": yes_no.f1_terms(said, label, positive="no"),
    }
    return {
        "task": meta["task"],
        "attribute": meta["attribute"],
        "label": label,
        "answer": answer,
        "parsed": official,
        "verdict": said,
        "correct": official == label,
        "paired": paired(meta["image"], sums),
    }


def _description_figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    def total(key: str) -> tuple[int, int]:
        above, below = zip(*(record["paired"]["sums"][key] for record in records))
        return sum(above), sum(below)

    def official(key: str) -> float:
        above, below = total(key)
        return round(above / (START + below) * 100, 1)

    whole, count = len(records) - total("hal")[0], START + len(records)
    figures = {key: official(key) for key in ("CHAIR", "cover", "cog")}
    figures["hal"] = round(100 - whole / count * 100, 1)
    for key in ("CHAIR_distinct", "repeat_rate"):
        above, below = total(key)
        figures[key] = 100 * above / below if below else 0.0
    return figures


def _yes_no_figures(
    records: Sequence[dict[str, Any]], *, key: str = "parsed", extra: float = 0.0001, start: float = START
) -> dict[str, float]:
    """Officially rounded. ``extra`` stands in the denominator of F1, ``start`` in the others: see inference.py."""
    right = sum(record[key] == record["label"] for record in records)
    said_no = sum(record[key] == "no" for record in records)
    is_no = sum(record["label"] == "no" for record in records)
    both = sum(record[key] == record["label"] == "no" for record in records)
    precision = round(both / (start + said_no) * 100, 1)
    recall = round(both / (start + is_no) * 100, 1)
    f1 = 2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + extra)
    return {
        "accuracy": round(right / (start + len(records)) * 100, 1),
        "precision": precision,
        "recall": recall,
        "f1": round(f1 * 100, 1),
    }


def _again(benchmark: AMBER) -> str:
    return f"run `python -m povid.benchmarks fetch amber --data {benchmark.data}` into an empty folder"


# Language -------------------------------------------------------------------------------------------------------------


def _check_language() -> None:
    """Raise a Fault if anything that scores descriptions is not installed; nothing large is loaded."""
    import nltk

    if importlib.util.find_spec("spacy") is None:
        raise Fault(f"AMBER's descriptions are scored with spaCy, which is not installed; {CURE}")
    import spacy.util

    if not spacy.util.is_package(VECTORS):
        raise Fault(f"AMBER's descriptions are scored with spaCy's {VECTORS}, which is not installed; {CURE}")
    for name, kind in (("averaged_perceptron_tagger_eng", "taggers"), ("wordnet", "corpora")):
        try:
            nltk.data.find(f"{kind}/{name}.zip")
        except LookupError:
            try:
                nltk.data.find(f"{kind}/{name}")
            except LookupError:
                raise Fault(f"AMBER's descriptions are scored with NLTK's {name}, which is missing; {CURE}") from None


def nouns(text: str) -> list[str]:
    """The nouns of a description, singular, in order, as NLTK tags and lemmatizes them (``extract_nouns``)."""
    import nltk

    lemmatizer = nltk.stem.WordNetLemmatizer()
    return [lemmatizer.lemmatize(word) for word, tag in nltk.pos_tag(word_tokenize(text)) if tag.startswith("NN")]


@functools.cache
def similarity(one: str, other: str) -> float:
    """The cosine of two words' vectors as spaCy computes it; 0 where a word has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about words without a vector
        return float(_vectors().make_doc(one).similarity(_vectors().make_doc(other)))


@functools.cache
def _vectors() -> Any:
    import spacy

    return spacy.load(VECTORS)
