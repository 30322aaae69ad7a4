"""CHAIR: how many of the objects that a caption mentions are not in the image (COCO 2014, or any list of objects)."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, Strict

from povid.benchmarks import coco
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Folder, Source, paired
from povid.benchmarks.chair_words import mended_singular, objects, official_singular, read_synonyms
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge


class CHAIR(Benchmark):
    """``data`` holds synonyms.txt and either objects.json or COCO's 2014 annotation files.

    objects.json maps an image id to its objects, each a word of synonyms.txt. Images are by default in data/images.
    Which images: those of ``ids``, else all of objects.json, else ``number`` images of val2014 drawn with ``seed``: the
    authors' 500 were never published.

    Attributes:
        prompt: what the model is asked about every image.
        number: images drawn from val2014; None for all of them.
        seed: of the draw.
        ids: a file of image ids or names (a JSON list or one per line), or the ids themselves, kept in that order.
    """

    name: ClassVar[str] = "chair"
    official: ClassVar[str] = "LisaAnne/Hallucination utils/chair.py (NLTK word_tokenize, pattern's singularize)"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("chair.CHAIR_S", "CHAIR", "low", 1, "S"),
        Column("chair.CHAIR_I", "CHAIR", "low", 1, "I"),
        Column("chair.coverage", "coverage", None, 1),
        Column("chair.words", "words", None, 1),
    )
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "https://raw.githubusercontent.com/LisaAnne/Hallucination/master/data/synonyms.txt",
            "synonyms.txt",
            size=3577,
            sha256="b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2",
        ),
        coco.ANNOTATIONS,
        coco.VAL2014,
    )
    notice: ClassVar[str] = (
        "If you have COCO's images elsewhere, set benchmarks.chair.images and fetch with --pictures none."
    )

    prompt: str = Field("Describe this image.", min_length=1)
    number: int | None = Field(500, ge=1)
    seed: int = 0
    ids: Folder | Annotated[tuple[int | str, ...], Strict(False)] | None = None

    def questions(self) -> list[Question]:
        """One question per image, its true objects in ``meta``.

        Raises Fault for missing or broken files, unknown objects and unknown images.
        """
        data, folder = self.data, self.images or self.data / "images"
        synonyms = read_synonyms(data / "synonyms.txt")
        mended = {word.strip().lower(): node for word, node in synonyms.items()}
        listed = _listed(data / "objects.json", synonyms) if (data / "objects.json").is_file() else None
        asked = _ids(self.ids) if isinstance(self.ids, Path) else None if self.ids is None else list(self.ids)
        if asked is None and listed is not None:
            asked = list(listed)
        elif asked is None:
            everything = coco.image_ids(data)
            asked = random.Random(self.seed).sample(everything, min(self.number or len(everything), len(everything)))
        names: dict[int | str, int | str] = {}
        for name in asked:
            names.setdefault(coco.image_key(name), name)
        if listed is not None:
            truth = {coco.image_key(name): found for name, found in listed.items()}
        else:
            truth = coco.read_annotations(data, {key for key in names if isinstance(key, int)})
        if unknown := [name for key, name in names.items() if key not in truth]:
            source = data / "objects.json" if listed is not None else f"COCO's 2014 annotation files in {data}"
            raise Fault(
                f"Image {unknown[0]!r} ({len(unknown)} of {len(names)} images) is not in {source}; "
                "without its true objects its caption cannot be scored: remove it or add its objects"
            )
        singular = mended_singular(mended)
        return [
            Question(
                id=name,
                image=coco.picture(folder, name),
                text=self.prompt,
                meta={
                    "objects": true_objects(truth[key], synonyms, official_singular),
                    "objects_corrected": true_objects(truth[key], mended, singular),
                    "synonyms": synonyms,
                    "listed": len(listed) if listed is not None else None,
                },
            )
            for key, name in names.items()
        ]

    def for_answers(self, file: Path) -> CHAIR:
        """The images that an answer file describes, in its order."""
        return self.changed(ids=tuple(image for _, image, _ in captions(file)))

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Captions in the order of the questions; Fault if an image has none, or a caption belongs to no question."""
        asked = {coco.image_key(question.id): question for question in questions}
        answers: dict[int | str, str] = {}
        for place, image, caption in captions(file):
            if coco.image_key(image) not in asked:
                raise Fault(
                    f"{place} describes image {image!r}, which is not one of the {len(asked)} images; remove it"
                )
            answers[coco.image_key(image)] = caption
        if missing := [question.id for key, question in asked.items() if key not in answers]:
            raise Fault(
                f"{Path(file).name} has no caption for {len(missing)} of {len(asked)} images, the first is "
                f"{missing[0]!r}; add them"
            )
        return [answers[coco.image_key(question.id)] for question in questions]

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """povid_captions.jsonl, captions.jsonl and chair.json: what to_chair.py, OPERA's chair.py and chair.py read.

        chair.json is what to_chair.py makes of the first, empty captions left out; the official script also requires
        the caption metrics of another evaluator and stops without them, so they are written as NaN: not computed.
        """
        rows = [
            {"image_id": coco.image_key(question.id), "caption": text} for question, text in zip(questions, answers)
        ]
        other = dict.fromkeys(
            ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L"), float("nan")
        )
        evaluated = {str(i): row | other for i, row in enumerate(rows) if row["caption"].strip()}
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(folder / "chair.json", json.dumps({"overall": other, "imgToEval": evaluated}))
        write_text(folder / "captions.jsonl", lines)
        povid = [
            {"id": _file_name(question), "question": question.text, "answer": text}
            for question, text in zip(questions, answers)
        ]
        return write_text(folder / "povid_captions.jsonl", "".join(json.dumps(row) + "\n" for row in povid))

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """Empty captions are skipped in POVID's layout, which goes through to_chair.py, and count in the others."""
        answers = self.answers_in(file, questions)
        return self._score(questions, answers, empty_count=not _is_povids(Path(file)))

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """CHAIR_S, CHAIR_I, coverage in percent; words per caption; counts; the same under "corrected".

        CHAIR_I: hallucinated mentions of all mentions in the corpus. CHAIR_S: captions with one of all captions.
        Coverage: true objects named at least once, of all (OPERA's recall). Empty captions leave every denominator, as
        to_chair.py drops them, and are counted in "empty"; "with_empty" has the figures with them, as official scripts
        print them for captions that do not pass through to_chair.py (there "without_empty" has the others). A ratio of
        nothing (no mention, no true object) is 0. "CHAIR_I_distinct" counts an object once for each caption, and
        "repeat_rate" is the share of mentions that repeat an object of their caption: repeating true objects lowers
        CHAIR_I.
        Records: {"image_id", "objects", "hallucinated", "counted"}, node words in order of mention with repeats.
        "corrected" reads captions, human ones too, with singulars that keep "bus" and "tie" and with the synonyms that
        a stray space or capital disables (" motor bike", " cheesecake", "iPhone").
        """
        return self._score(questions, answers, empty_count=False)

    def _score(self, questions: Sequence[Question], answers: Sequence[str], *, empty_count: bool) -> Score:
        empty = [not answer.strip() for answer in answers]
        if all(empty):
            raise Fault(f"CHAIR has nothing to score: every caption ({len(answers)}) is empty; give captions with text")
        synonyms = questions[0].meta["synonyms"]
        mended = {word.strip().lower(): node for word, node in synonyms.items()}
        singular = mended_singular(mended)
        pairs = list(zip(questions, answers, strict=True))
        whole = [pair for pair, nothing in zip(pairs, empty) if not nothing]
        kept, others = (pairs, whole) if empty_count else (whole, pairs)
        mentions = [objects(answer, synonyms) for _, answer in kept]
        scores: dict[str, Any] = _figures(mentions, [question.meta["objects"] for question, _ in kept])
        scores["words"] = sum(len(answer.split()) for _, answer in kept) / len(kept)
        scores |= {"captions": len(kept), "empty": sum(empty)}
        if any(empty):
            scores["without_empty" if empty_count else "with_empty"] = _figures(
                [objects(answer, synonyms) for _, answer in others],
                [question.meta["objects"] for question, _ in others],
            )
        if questions[0].meta["listed"] is not None and self.limit is None:
            scores["without_caption"] = questions[0].meta["listed"] - len(questions)
        corrected = _figures(
            [objects(answer, mended, singular) for _, answer in kept],
            [question.meta["objects_corrected"] for question, _ in kept],
        )
        what = "singular bus and tie kept; synonyms disabled by a space or capital mended"
        scores["corrected"] = corrected | {"what": what}
        read = {question.id: found for (question, _), found in zip(kept, mentions)}
        return Score(scores, [_record(question, read.get(question.id)) for question in questions])

    def notes(self, score: Score) -> list[str]:
        """Which captions and images are not in the score."""
        notes = []
        if empty := [record["image_id"] for record in score.records if not record["counted"]]:
            notes.append(
                f"empty captions, left out as in the official to_chair.py: {len(empty)} (the first is of image "
                f"{empty[0]!r}); with them CHAIR_S is {score.scores['with_empty']['CHAIR_S']:.1f}"
            )
        if other := score.scores.get("without_empty"):
            notes.append(
                f"empty captions, counted as the official chair.py does in this layout: {score.scores['empty']}; "
                f"without them CHAIR_S is {other['CHAIR_S']:.1f}"
            )
        if missing := score.scores.get("without_caption"):
            notes.append(f"images of objects.json without a caption, left out of the score: {missing}")
        return notes


def _file_name(question: Question) -> str:
    """How POVID's captions name an image: by its file."""
    return question.image.name if isinstance(question.image, Path) else str(question.id)


def _is_povids(file: Path) -> bool:
    """Whether a file of captions has POVID's layout, which to_chair.py reads: {"id", "answer"}."""
    return all(
        isinstance(record, dict) and "answer" in record and "image_id" not in record for _, record in read_records(file)
    )


def true_objects(found: coco.Annotation, synonyms: Mapping[str, str], singular: Callable[[str], str]) -> frozenset[str]:
    """Node words of the instance categories, and of everything read in the human captions."""
    if unknown := found.names - synonyms.keys():
        raise Fault(f"COCO's category {min(unknown)!r} is not a word of synonyms.txt; use CHAIR's own list")
    read = (node for caption in found.captions for node in objects(caption, synonyms, singular))
    return frozenset(synonyms[name] for name in found.names).union(read)


def _listed(file: Path, synonyms: Mapping[str, str]) -> dict[str, coco.Annotation]:
    """objects.json: image id → names, each a word of synonyms.txt."""
    records = read_records(file)
    table = records[0][1] if len(records) == 1 else None
    if not isinstance(table, dict):
        raise Fault(f"{file} is not a single JSON object; write it as {{image id: [objects]}}")
    keys: dict[int | str, str] = {}
    for image, names in table.items():
        other = keys.setdefault(coco.image_key(image), image)
        if other != image:
            raise Fault(f"{file} lists {other!r} and {image!r}, which are the same image; keep one of them")
        if not isinstance(names, list):
            raise Fault(f"{file} image {image!r} has {names!r} where a list of objects was expected; write a list")
        for name in names:
            if name not in synonyms:
                near = difflib.get_close_matches(str(name), synonyms, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "use a word of synonyms.txt or add it there"
                raise Fault(f"{file} image {image!r} names {name!r}, which is not in synonyms.txt; {hint}")
    return {image: coco.Annotation(set(names)) for image, names in table.items()}


def _ids(file: Path) -> list[int | str]:
    """Image ids or file names: a JSON list, or one per line."""
    try:
        lines = file.read_text(encoding="utf-8").split()
    except OSError as error:
        raise Fault(f"{file} cannot be read ({error.strerror}); give a file with one image id per line") from None
    if lines and lines[0].startswith("["):
        return [item for _, item in read_records(file)]
    return [int(line) if line.isdigit() else line for line in lines]


def captions(file: Path) -> list[tuple[str, int | str, str]]:
    """(place, image id, caption) of each record of an answer file, in its order.

    Understood: {"image_id", "caption" or "text"} as JSON Lines or list, POVID's {"id": "COCO_val2014_….jpg", "answer"},
    and to_chair.py's {"overall", "imgToEval"}. Raises Fault for a record without id or caption and for an image twice.
    """
    file = Path(file)
    records = read_records(file)
    if len(records) == 1 and isinstance(records[0][1], dict) and isinstance(records[0][1].get("imgToEval"), dict):
        records = [(f"{file.name} imgToEval[{key!r}]", item) for key, item in records[0][1]["imgToEval"].items()]
    found: list[tuple[str, int | str, str]] = []
    seen: dict[int | str, str] = {}
    for place, record in records:
        if not isinstance(record, dict):
            raise Fault(f"{place} is {record!r:.60}, not an object with image_id and caption; write it as one")
        image = record["image_id"] if "image_id" in record else record.get("id")
        if isinstance(image, bool) or not isinstance(image, (int, str)) or image == "":
            raise Fault(f'{place} has no image ("image_id" or "id" is {image!r}); name the image that it describes')
        if "image_id" not in record:
            image = coco.image_key(image)
        key = next((key for key in ("caption", "answer", "text") if key in record), None)
        if key is None or not isinstance(record[key], str):
            raise Fault(f'{place} (image {image!r}) has no caption: "caption", "answer" or "text" must be a string')
        if (other := seen.setdefault(coco.image_key(image), place)) != place:
            raise Fault(f"{place} describes image {image!r} again, after {other}; keep one caption for each image")
        found.append((place, image, record[key]))
    if not found:
        raise Fault(f"{file} holds no caption; give one record for each image")
    return found


def _figures(mentions: Sequence[Sequence[str]], truths: Sequence[frozenset[str]]) -> dict[str, float | int]:
    wrong = [[node for node in found if node not in truth] for found, truth in zip(mentions, truths)]
    said, hallucinated = sum(map(len, mentions)), sum(map(len, wrong))
    distinct = sum(len(set(found)) for found in mentions)
    named = sum(len(truth.intersection(found)) for found, truth in zip(mentions, truths))
    there = sum(map(len, truths))
    return {
        "CHAIR_S": 100 * sum(len(found) > 0 for found in wrong) / len(mentions),
        "CHAIR_I": 100 * hallucinated / said if said else 0.0,
        "coverage": 100 * named / there if there else 0.0,
        "mentions": said,
        "hallucinated_mentions": hallucinated,
        "CHAIR_I_distinct": 100 * sum(len(set(found)) for found in wrong) / distinct if distinct else 0.0,
        "repeat_rate": 100 * (said - distinct) / said if said else 0.0,
    }


def _record(question: Question, read: Sequence[str] | None) -> dict[str, Any]:
    """What was read in a caption; ``read`` is None for one that does not count."""
    truth, found = question.meta["objects"], read or []
    wrong = [node for node in found if node not in truth]
    distinct, counted = set(found), int(read is not None)
    sums = {
        "CHAIR_S": [int(bool(wrong)), counted],
        "CHAIR_I": [len(wrong), len(found)],
        "CHAIR_I_distinct": [len(set(wrong)), len(distinct)],
        "coverage": [len(truth & distinct), counted * len(truth)],
        "repeat_rate": [len(found) - len(distinct), len(found)],
    }
    letters = ("h" if node not in truth else "r" if node in found[:i] else "n" for i, node in enumerate(found))
    return {
        "image_id": question.id,
        "objects": list(found),
        "hallucinated": wrong,
        "counted": read is not None,
        "paired": paired(question.id, sums, mentions="".join(letters)),
    }
