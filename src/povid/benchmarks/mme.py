"""MME: yes/no questions, two for each image, in ten subtasks of perception and four of cognition."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from povid.benchmarks import llava_format
from povid.benchmarks.benchmark import Benchmark, Column, Source, paired
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUFFIX = "Answer the question using a single word or phrase."
PHRASE = " Please answer yes or no."
_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")


class MME(Benchmark):
    """``data`` holds MME_Benchmark_release_version/ (images and questions), eval_tool/ (questions alone), or both."""

    name: ClassVar[str] = "mme"
    official: ClassVar[str] = (
        "BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation) tools/eval_tool.zip calculation.py"
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("mme.perception", "MME-P", "high", 1),
        Column("mme.cognition", "MME-C", "high", 1),
    )
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "https://raw.githubusercontent.com/BradyFU/Awesome-Multimodal-Large-Language-Models/Evaluation/tools/"
            "eval_tool.zip",
            "eval_tool.zip",
            size=107320,
            sha256="b8125e2a7c3418e5761c12b3cfe4f1624b3c53ba44009e75b7d3f797d3d8acee",
            unpack=".",
        ),
        Source(
            "https://huggingface.co/datasets/darkyarding/MME/resolve/main/MME_Benchmark_release_version.zip",
            "MME_Benchmark_release_version.zip",
            unpack=".",
        ),
    )
    notice: ClassVar[str] = (
        "If the images cannot be downloaded, request them as the readme of "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation says and unpack "
        "MME_Benchmark_release_version into {data}; answers can be scored without them."
    )

    max_new_tokens: int = Field(128, ge=1)

    def questions(self) -> list[Question]:
        """Two questions for each image, subtask after subtask, from eval_tool/Your_Results or from the release itself.

        LLaVA's short-answer suffix replaces the phrase "Please answer yes or no." Subtasks whose files are missing are
        left out, but at least one must be there.
        """
        data, images = self.data, self.images
        release = next((folder for folder in (data / "MME_Benchmark_release_version", data) if _subtasks(folder)), None)
        if release and _subtasks(release / "MME_Benchmark"):
            release = release / "MME_Benchmark"
        tool = next(
            (
                folder
                for folder in (data / "eval_tool" / "Your_Results", data / "Your_Results", data)
                if any((folder / f"{subtask}.txt").is_file() for subtask in PERCEPTION + COGNITION)
            ),
            None,
        )
        questions: list[Question] = []
        for subtask in PERCEPTION + COGNITION:
            if tool and (tool / f"{subtask}.txt").is_file():
                rows = _rows(tool / f"{subtask}.txt")
            elif release and (release / subtask).is_dir():
                rows = _release_rows(release / subtask)
            else:
                continue
            for number, (place, image, text, label, *_) in enumerate(rows):
                if label.lower() not in ("yes", "no"):
                    raise Fault(f"{place} has {label!r} where Yes or No was expected; download the file again")
                if number % 2 and image != questions[-1].meta["image"]:
                    raise Fault(
                        f"{place} is about {image} and the line before about {questions[-1].meta['image']}, but "
                        "two lines belong to each image; download the file again"
                    )
                folders = [
                    images / subtask / "images" if images else None,
                    images / subtask if images else None,
                    release / subtask / "images" if release else None,
                    (release or data) / subtask,
                ]
                stem = _stem(image)
                path = llava_format.picture(folders, [image, *(stem + suffix for suffix in _SUFFIXES)])
                prompt = f"{text.replace(PHRASE, '').strip()}\n{SUFFIX}"
                meta = {
                    "subtask": subtask,
                    "image": image,
                    "question": text,
                    "label": label,
                    "question_id": f"{subtask}/{stem}{Path(image).suffix}",
                }
                questions.append(Question(f"{subtask}/{stem}/{number % 2}", path, prompt, meta))
            if len(questions) % 2:
                raise Fault(
                    f"MME's {subtask} has an odd number of questions, but two belong to each image; download the "
                    "files again"
                )
        if not questions:
            llava_format.needed(self, ["MME_Benchmark_release_version", "eval_tool"])
        return questions

    def first(self, questions: Sequence[Question], count: int) -> list[Question]:
        """Those about the first ``count`` pictures of each subtask: a sum needs all of its subtasks."""
        subtasks: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            subtasks[question.meta["subtask"]].append(question)
        found: list[Question] = []
        for members in subtasks.values():
            found += super().first(members, count)
        return found

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers from a folder of official <subtask>.txt files, or from LLaVA's JSON Lines.

        A question is identified by its subtask, its image's name without suffix and its text without prompt phrases,
        because LLaVA's converter writes a .txt name for the image and both questions of an image share their
        question_id.
        """
        file = Path(file)
        found = _official_answers(file) if file.is_dir() else _llava_answers(file, {str(q.id): q for q in questions})
        return llava_format.in_order(
            file,
            found,
            questions,
            lambda question: _key(question.meta["subtask"], question.meta["image"], question.meta["question"]),
        )

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """``mme_results/<subtask>.txt`` for calculation.py (tabs and line breaks of answers become spaces)."""
        lines: dict[str, list[str]] = defaultdict(list)
        for question, answer in zip(questions, answers, strict=True):
            meta = question.meta
            cells = (
                meta["image"],
                meta["question"],
                meta["label"],
                re.sub(r"[\t\r\n]", " ", llava_format.whole(answer)),
            )
            lines[meta["subtask"]].append("\t".join(cells) + "\n")
        for subtask, rows in lines.items():
            write_text(Path(folder) / "mme_results" / f"{subtask}.txt", "".join(rows))
        return Path(folder) / "mme_results"

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Per subtask 100 x (accuracy + share of images with both answers right), summed to perception and cognition.

        "corrected" takes the first word as the answer ("Not sure" is no "no"). A sum over fewer than all its subtasks
        is None: those that are there are listed under "subtasks". Raises Fault when questions do not come in pairs.
        """
        records = []
        for question, answer in zip(questions, answers, strict=True):
            label, parsed, corrected = question.meta["label"].lower(), parse(answer), parse_corrected(answer)
            records.append(
                {
                    "id": question.id,
                    "subtask": question.meta["subtask"],
                    "image": question.meta["image"],
                    "answer": answer,
                    "label": label,
                    "parsed": parsed,
                    "correct": parsed == label,
                    "corrected": corrected == label,
                    "paired": paired(
                        f"{question.meta['subtask']}/{question.meta['image']}", {"accuracy": [int(parsed == label), 1]}
                    ),
                }
            )
        scores = _figures(records, "correct")
        scores["other"] = sum(record["parsed"] == "other" for record in records)
        if any(record["correct"] != record["corrected"] for record in records):
            scores["corrected"] = _figures(records, "corrected")
        return Score(scores, records)


def parse(answer: str) -> str:
    """ "yes", "no" or "other": what the first four characters of the lower-cased answer contain, yes first.

    The official rule, quirks included: "now", "not" and "none" are no, and the answer is not stripped.
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def parse_corrected(answer: str) -> str:
    """The first word, if it is yes or no."""
    word = re.match(r"\W*([a-z]+)", answer.lower())
    return word[1] if word and word[1] in ("yes", "no") else "other"


def _figures(records: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["subtask"]].append(record)
    subtasks = {}
    for subtask, here in rows.items():
        pairs = list(zip(here[::2], here[1::2]))
        if len(here) % 2 or any(one["image"] != other["image"] for one, other in pairs):
            raise Fault(f"MME's {subtask} has questions that are not in pairs of the same image; score all of them")
        accuracy = sum(record[key] for record in here) / len(here)
        both = sum(one[key] and other[key] for one, other in pairs) / len(pairs)
        subtasks[subtask] = {
            "score": accuracy * 100 + both * 100,
            "accuracy": 100 * accuracy,
            "accuracy_plus": 100 * both,
            "questions": len(here),
        }

    def total(names: Iterable[str]) -> float | None:
        names = list(names)
        return sum(subtasks[name]["score"] for name in names) if set(names) <= set(subtasks) else None

    return {
        "perception": total(PERCEPTION),
        "cognition": total(COGNITION),
        "subtasks": subtasks,
        "questions": len(records),
    }


def _subtasks(folder: Path) -> bool:
    return any((folder / subtask).is_dir() for subtask in PERCEPTION + COGNITION) or (folder / "MME_Benchmark").is_dir()


def _rows(file: Path, columns: int = 3) -> list[list[str]]:
    """[place, image, question, label, (answer)] of a tab-separated file; lines end as Python's readlines takes them."""
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [
                [f"{file.name} line {number}", *line.removesuffix("\n").split("\t")]
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{file} cannot be read ({error}); give a UTF-8 text file") from error
    for place, *cells in rows:
        if len(cells) < columns or (columns == 4 and len(cells) > 4):
            raise Fault(
                f"{place} of {file.parent} has {len(cells)} fields between tabs where image, question, Yes or "
                f"No{', answer' if columns == 4 else ''} were expected; correct that line"
            )
    return rows


def _release_rows(folder: Path) -> list[list[str]]:
    """Questions of one subtask of the release: <image>.txt beside the picture, or in questions_answers_YN."""
    folder = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    pictures = {
        path.stem: path.name
        for place in (folder, folder.parent / "images")
        if place.is_dir()
        for path in place.iterdir()
        if path.suffix in _SUFFIXES
    }
    rows = []
    for file in sorted(folder.glob("*.txt")):
        lines = [line.strip().split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) != 2 or any(len(cells) != 2 for cells in lines):
            raise Fault(f"{file} does not hold two lines of question, tab, answer; download it again")
        rows += [[str(file), pictures.get(file.stem, f"{file.stem}.jpg"), *cells] for cells in lines]
    return rows


def _stem(image: str) -> str:
    return re.sub(r"\.(jpg|jpeg|png|txt)$", "", image.rsplit("/", 1)[-1], flags=re.IGNORECASE)


def _key(subtask: str, image: str, text: str) -> str:
    for phrase in (SUFFIX, "Please answer yes or no.", "<image>"):
        text = text.replace(phrase, "")
    return f"{subtask}/{_stem(image)}: {' '.join(text.split())}"


def _official_answers(folder: Path) -> Iterable[tuple[str, str, Any]]:
    files = [folder / f"{subtask}.txt" for subtask in PERCEPTION + COGNITION]
    if not any(file.is_file() for file in files):
        raise Fault(f"{folder} holds none of MME's <subtask>.txt files; give the folder that does")
    for file in files:
        for place, image, text, _, answer in _rows(file, columns=4) if file.is_file() else []:
            yield place, _key(file.stem, image, text), answer


def _llava_answers(file: Path, known: dict[str, Question]) -> Iterable[tuple[str, str, Any]]:
    for (place, name, answer), (_, _, prompt) in zip(llava_format.texts(file), llava_format.texts(file, text="prompt")):
        subtask, _, image = name.partition("/")
        if name in known:  # the ids of this file's questions, which are one for each question
            image = known[name].meta["image"]
        yield place, _key(subtask, image, str(prompt)), answer
