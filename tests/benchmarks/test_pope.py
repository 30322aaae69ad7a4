"""POPE against the official script's figures, its parser's quirks, and answers that do not fit their questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from shared import shared

from povid.benchmarks import pope, yes_no
from povid.benchmarks.pope import POPE
from povid.fault import Fault

ANY = POPE(data="data")  # what reads no official file

OBJECTS = {
    "random": ["cat", "orange", "dog", "car"],
    "popular": ["cat", "person", "dog", "chair"],
    "adversarial": ["cat", "fork", "dog", "truck"],
}


def write_lines(file: Path, rows: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def question_rows(split: str) -> list[dict[str, Any]]:
    """Two images, two questions each; yes and no alternate as officially."""
    return [
        {
            "question_id": i + 1,
            "image": f"COCO_val2014_{1 + i // 2:012d}.jpg",
            "label": ("yes", "no")[i % 2],
            "text": f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?",
        }
        for i, name in enumerate(OBJECTS[split])
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for split in OBJECTS:
        write_lines(tmp_path / "data" / f"coco_pope_{split}.json", question_rows(split))
    return tmp_path / "data"


def test_every_official_figure_of_the_golden_answers(tmp_path: Path) -> None:
    case = json.loads(shared("golden/pope_answers_adversarial.json").read_text())
    official = shared("golden/coco_pope_adversarial.json")
    (tmp_path / official.name).write_text(official.read_text())
    file = write_lines(tmp_path / "answers.jsonl", case["answers"])
    questions = POPE(data=tmp_path).questions()
    score = ANY.score(questions, ANY.read_answers(file, questions))
    got, expected = score.scores["adversarial"], case["expected"]
    for key, name in (
        ("accuracy", "Accuracy"),
        ("precision", "Precision"),
        ("recall", "Recall"),
        ("f1", "F1 score"),
        ("yes_ratio", "Yes ratio"),
    ):
        assert got[key] == pytest.approx(100 * expected[name], abs=1e-12)
        assert score.scores[key] == got[key]  # one split: the mean is its figure
    assert [got[key] for key in ("tp", "fp", "tn", "fn")] == [expected[key] for key in ("tp", "fp", "tn", "fn")]
    assert got["questions"] == len(score.records) == 3000


def test_parsers() -> None:
    for answer, official, corrected in [
        ("Yes", False, False),
        ("No", True, True),
        ("no", True, True),
        ("No.", True, True),
        ("No, no dog", True, True),
        ("NO", False, True),
        ("No\n", False, True),
        ("none", False, True),
        ("Nope", False, True),
        ("", False, True),
        ("There isn't a dog", False, True),
        ("There isn’t one", False, True),
        ("I cannot see one", False, True),
        ("Yes, it is not hard to see", True, False),
        ("There is a dog. No cat", False, False),
        ("There is no dog", True, True),
        ("no,thing", False, True),
        ("Not sure", False, True),
        ("  no", True, True),
        ("There is a snowboard and a knot", False, False),
        ("yes\nno", False, False),
        ("Yes no", True, False),
        ("There is\tno dog", False, True),
        ("ok.no", False, False),
        (", No", True, True),
        ("!", False, True),
    ]:
        assert pope.says_no(answer) is official
        assert pope.says_no_corrected(answer) is corrected


def slow_parser(text: str) -> bool:
    """The official rule letter by letter."""
    kept, words, word = "", [], ""
    for letter in text:
        if letter == ".":
            break
        kept += "" if letter == "," else letter
    for letter in kept + " ":
        if letter == " ":
            words.append(word)
            word = ""
        else:
            word += letter
    return any(word == "No" or word == "no" or word == "not" for word in words)


@given(
    st.one_of(
        st.text(alphabet="Nnot ,.\ny", max_size=12),
        st.lists(st.sampled_from(["No", "no", "not", "NO", "yes", ",", ".", " ", "\n"])).map("".join),
    )
)
def test_parser_agrees_with_a_slow_reading(text: str) -> None:
    assert pope.says_no(text) == slow_parser(text)


def test_questions_of_one_image_stand_together_over_the_splits(data: Path) -> None:
    questions = POPE(data=data).questions()
    images = [question.image for question in questions]
    assert len(questions) == 12 and images == [images[0]] * 6 + [images[6]] * 6
    assert len({question.id for question in questions}) == 12
    assert questions[0].text == "Is there a cat in the image?\nAnswer the question using a single word or phrase."
    assert POPE(data=data, suffix="").questions()[0].text == "Is there a cat in the image?"


def test_score_by_hand(data: Path) -> None:
    """Labels yes no yes no in every split.

    random: y n n n → tp 1, fn 1, tn 2: accuracy 75, precision 100, recall 50, F1 2/3, yes 25.
    popular: all yes → tp 2, fp 2: accuracy 50, precision 50, recall 100, F1 2/3, yes 100.
    adversarial: all no → accuracy 50, precision and F1 of nothing are 0, yes 0.
    Mean F1 (2/3 + 2/3 + 0) / 3 = 4/9.
    """
    said = {"random": ["Yes", "no", "No.", "not at all"], "popular": ["Yes"] * 4, "adversarial": ["no"] * 4}
    questions = POPE(data=data).questions()
    answers = [said[question.meta["split"]][question.meta["position"]] for question in questions]
    scores = ANY.score(questions, answers).scores
    assert scores["f1"] == pytest.approx(400 / 9)
    assert scores["accuracy"] == pytest.approx((75 + 50 + 50) / 3)
    assert scores["precision"] == pytest.approx(50) and scores["recall"] == pytest.approx(50)
    assert scores["yes_ratio"] == pytest.approx(125 / 3)
    assert scores["random"] == pytest.approx(
        {
            "accuracy": 75,
            "precision": 100,
            "recall": 50,
            "f1": 200 / 3,
            "yes_ratio": 25,
            "questions": 4,
            "tp": 1,
            "fp": 0,
            "tn": 2,
            "fn": 1,
            "invalid": 0,
            "f1_valid": 200 / 3,
        }
    )
    assert list(scores)[5:8] == ["random", "popular", "adversarial"]
    assert scores["adversarial"]["precision"] == scores["adversarial"]["f1"] == 0.0
    assert scores["corrected"]["f1"] == scores["f1"]


def test_invalid_answers_stand_beside_the_official_figures(data: Path) -> None:
    """Labels yes no yes no. Officially each of these answers counts as yes: tp 2, fp 2, F1 2/3.

    A reader finds tp 1, fp 1 in the first case, tp 1, tn 1, fp 1 in the second, tp 2, tn 2 in the third.
    """
    benchmark = POPE(data=data, splits=["random"])
    questions = sorted(benchmark.questions(), key=lambda question: question.meta["position"])
    for answers, official, invalid, others in [
        (["Yes", "Yes", "A dog.", "I cannot tell"], 200 / 3, 50, 200 / 3),
        (["Yes", "NO", "A dog.", "Yes"], 200 / 3, 25, 200 / 3),
        (["Yes", "NO", "yes", "Nope"], 200 / 3, 0, 100),
        (["?"] * 4, 200 / 3, 100, 0),
    ]:
        score = benchmark.score(questions, answers)
        found = (score.scores["f1"], score.scores["invalid"], score.scores["f1_valid"])
        assert found == pytest.approx((official, invalid, others)), answers
        assert bool(benchmark.notes(score)) == (invalid > 1)


def test_what_a_reader_takes_for_yes_no_or_neither() -> None:
    for answer, verdict in [
        ("Yes", "yes"),
        ("NO, there is", "no"),
        ("Yeah, it is.", "yes"),
        ("There is a dog. No cat", "yes"),
        ("There are no dogs", "no"),
        ("There isn’t one", "no"),
        ("I cannot see one", "no"),
        ("I can't tell", None),
        ("Not sure", None),
        ("Perhaps yes, perhaps no", None),
        ("A dog and a knot", None),
        ("", None),
        ("!", None),
    ]:
        assert yes_no.verdict(answer) == verdict, answer


def test_records_tell_what_was_parsed(data: Path) -> None:
    questions = POPE(data=data, splits=["random"]).questions()
    records = ANY.score(questions, ["Yes", "NO", "not", "no"]).records
    assert records[1] == {
        "split": "random",
        "question_id": 2,
        "image": "COCO_val2014_000000000001.jpg",
        "label": "no",
        "parsed": "yes",
        "correct": False,
        "parsed_corrected": "no",
        "verdict": "no",
        "paired": {
            "picture": "COCO_val2014_000000000001.jpg",
            "group": "random",
            "sums": {"f1": [0, 1], "accuracy": [0, 1], "yes_ratio": [1, 1], "invalid": [0, 1], "f1_valid": [0, 0]},
        },
    }
    assert [record["correct"] for record in records] == [True, False, False, True]


def llava_rows(data: Path) -> tuple[list[dict], list[dict]]:
    """LLaVA's one question file over the splits in its own order, and answers that tell split and position."""
    asked, given = [], []
    for split in ("adversarial", "popular", "random"):
        for position, row in enumerate(question_rows(split)):
            text = row["text"] + pope.SHORT_ANSWER
            asked.append({"question_id": len(asked), "image": row["image"], "text": text, "category": split})
            given.append(
                {
                    "question_id": len(given),
                    "prompt": text,
                    "text": f"{split} {position}",
                    "answer_id": "x",
                    "model_id": "m",
                    "metadata": {},
                }
            )
    return asked, given


def told(questions: list) -> list[str]:
    return [f"{question.meta['split']} {question.meta['position']}" for question in questions]


@pytest.mark.parametrize("way", ["question file", "prompts", "shuffled", "folder", "own", "category"])
def test_answers_of_all_splits_find_their_questions(data: Path, tmp_path: Path, way: str) -> None:
    asked, given = llava_rows(data)
    file = tmp_path / "answers.jsonl"
    if way in ("question file", "shuffled"):
        write_lines(data / "llava_pope_test.jsonl", asked)
    if way == "shuffled":
        random.Random(0).shuffle(given)
    if way == "question file":
        given = [{"question_id": row["question_id"], "text": row["text"]} for row in given]
    if way == "category":
        given = [{"category": row["text"].split()[0], "text": row["text"]} for row in given]
    questions = POPE(data=data).questions()
    if way == "folder":
        file = tmp_path / "answers"
        file.mkdir()
        for split in OBJECTS:
            rows = [{"question": row["prompt"], "answer": row["text"]} for row in given if split in row["text"]]
            write_lines(file / f"coco_{split}_answers.json", rows)
    elif way == "own":
        file = ANY.write_official(questions, told(questions), tmp_path / "official")
        (data / "llava_pope_test.jsonl").write_text((tmp_path / "official" / "llava_pope_test.jsonl").read_text())
        questions = POPE(data=data).questions()
    else:
        write_lines(file, given)
    assert POPE(data=data).for_answers(file).splits == ("random", "popular", "adversarial")
    assert ANY.read_answers(file, questions) == told(questions)


def test_official_files_per_split_are_what_the_official_script_reads(data: Path, tmp_path: Path) -> None:
    questions = POPE(data=data).questions()
    ANY.write_official(questions, told(questions), tmp_path / "official")
    lines = (tmp_path / "official" / "coco_pope_popular_answers.json").read_text().splitlines()
    assert json.loads(lines[1]) == {"question": "Is there a person in the image?", "answer": "popular 1"}
    file = tmp_path / "official" / "coco_pope_popular_answers.json"
    assert POPE(data=data).for_answers(file).splits == ("popular",)
    assert ANY.read_answers(file, POPE(data=data, splits=["popular"]).questions()) == [f"popular {i}" for i in range(4)]


def test_one_split_is_recognised_by_what_it_answers(data: Path, tmp_path: Path) -> None:
    rows = [{"question": row["text"].lower(), "answer": "yes"} for row in question_rows("adversarial")]
    assert POPE(data=data).for_answers(write_lines(tmp_path / "mine.jsonl", rows)).splits == ("adversarial",)
    with pytest.raises(Fault, match="mine.jsonl has 4 answers but does not say of which split"):
        POPE(data=data).for_answers(write_lines(tmp_path / "mine.jsonl", [{"text": "yes"}] * 4))


def test_ids_in_another_order_are_put_in_order(data: Path, tmp_path: Path) -> None:
    for form in [int, str, lambda i: f"random/{i}"]:
        rows = [{"question_id": form(i), "text": f"answer {i}"} for i in (3, 1, 4, 2)]
        questions = POPE(data=data, splits=["random"]).questions()
        file = write_lines(tmp_path / "a.jsonl", rows)
        assert ANY.read_answers(file, questions) == [f"answer {i}" for i in (1, 2, 3, 4)]


def test_the_official_figures_count_by_position_and_those_by_id_stand_beside_them(data: Path, tmp_path: Path) -> None:
    """Answers yes, no, yes, no to questions 1 to 4 are all right; in the order 2, 1, 4, 3 all are wrong by position.
    In the order 1, 3, 4 the official script sees yes, yes, no beside the labels yes, no, yes: tp 1, fp 1, fn 1."""
    right = {1: "yes", 2: "no", 3: "yes", 4: "no"}
    benchmark = POPE(data=data, splits=["random"])
    for order, official, missing in [((1, 2, 3, 4), 100, 0), ((2, 1, 4, 3), 0, 0), ((1, 3, 4), 50, 1)]:
        file = write_lines(tmp_path / "a.jsonl", [{"question_id": i, "text": right[i]} for i in order])
        score = benchmark.score_file(file, benchmark.questions())
        assert score.scores["f1"] == pytest.approx(official), order
        assert score.scores["random"]["questions"] == 4 - missing
        assert ("by_id" in score.scores) == bool(benchmark.notes(score)) == (order != (1, 2, 3, 4))
        if "by_id" in score.scores:
            assert score.scores["by_id"]["f1"] == pytest.approx(100)
            assert "F1 100.00" in benchmark.notes(score)[0]


def test_our_own_ids_are_followed(data: Path, tmp_path: Path) -> None:
    rows = [{"question_id": f"random/{i}", "text": "yes" if i % 2 else "no"} for i in (2, 1, 4, 3)]
    benchmark = POPE(data=data, splits=["random"])
    scores = benchmark.score_file(write_lines(tmp_path / "a.jsonl", rows), benchmark.questions()).scores
    assert scores["f1"] == 100 and "by_id" not in scores


def test_missing_answers_of_all_splits(data: Path, tmp_path: Path) -> None:
    """LLaVA's ids say of which split an answer is, so a file without the first (adversarial) one is scored."""
    asked, given = llava_rows(data)
    write_lines(data / "llava_pope_test.jsonl", asked)
    file = write_lines(tmp_path / "a.jsonl", given[1:])
    benchmark = POPE(data=data).for_answers(file)
    scores = benchmark.score_file(file, benchmark.questions()).scores
    assert [scores[split]["questions"] for split in OBJECTS] == [4, 4, 3] and "by_id" in scores


def test_ids_of_another_file_count_by_position_while_they_rise(data: Path, tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": f"answer {i}"} for i in (8, 9, 10, 11)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert ANY.read_answers(file, POPE(data=data, splits=["random"]).questions()) == [
        f"answer {i}" for i in (8, 9, 10, 11)
    ]


def test_spelling_of_older_questions_does_not_matter(data: Path, tmp_path: Path) -> None:
    rows = [
        {"question": row["text"].replace("an orange in the image", "an orange in the imange"), "answer": "yes"}
        for row in question_rows("random")
    ]
    questions = POPE(data=data, splits=["random"]).questions()
    assert ANY.read_answers(write_lines(tmp_path / "a.jsonl", rows), questions) == ["yes"] * 4


def test_answers_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    for rows, sentence in [
        ([{"text": "yes"}] * 3, "a.jsonl has 3 answers, but coco_pope_random.json has 4 questions; every question"),
        ([{"text": "yes"}] * 5, "a.jsonl has 5 answers, but coco_pope_random.json has 4 questions"),
        ([{"text": "yes"}] * 2910, "has 2910 answers, but coco_pope_random.json has 4 questions (2910 is the older"),
        ([{"question_id": i, "text": "yes"} for i in (1, 2, 2, 4)], "line 3 answers question_id '2' a second time"),
        ([{"question_id": i, "text": "yes"} for i in (11, 12, 14, 13)], "line 4 has question_id '13' after '14'"),
        (
            [
                {"question": f"Is there a {name} in the image?", "answer": "no"}
                for name in ("cat", "orange", "car", "dog")
            ],
            "line 3 answers 'Is there a car in the image?', but question 3 of coco_pope_random.json asks",
        ),
        ([{"question_id": 1, "answer": 5}], 'line 1 has no answer: "answer" (POPE) or "text" (LLaVA)'),
        (["yes"], "line 1 has no answer"),
    ]:
        file = write_lines(tmp_path / "a.jsonl", rows)
        with pytest.raises(Fault) as caught:
            ANY.read_answers(file, POPE(data=data, splits=["random"]).questions())
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_all_splits_of_another_version_are_refused(data: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "yes"}] * 11)
    with pytest.raises(Fault, match="a.jsonl has 11 answers, but the splits in .* have random 4, popular 4"):
        POPE(data=data).for_answers(file)
    with pytest.raises(Fault, match="a.jsonl has 11 answers, but the splits have random 4, popular 4, adversarial 4"):
        ANY.read_answers(file, POPE(data=data).questions())
    with pytest.raises(Fault, match="line 1 starts answers whose split is unclear"):
        ANY.read_answers(write_lines(tmp_path / "a.jsonl", [{"text": "yes"}] * 12), POPE(data=data).questions())


def test_a_folder_needs_one_file_per_split(data: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    write_lines(tmp_path / "given" / "random.json", [{"text": "yes"}] * 4)
    assert POPE(data=data).for_answers(tmp_path / "given").splits == ("random",)
    with pytest.raises(Fault, match="given has 0 files with 'popular' in their names"):
        ANY.read_answers(tmp_path / "given", POPE(data=data).questions())


def test_bad_question_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    for rows, sentence in [
        ([{"question_id": 1}], "coco_pope_random.json line 1 is not a POPE question"),
        ([{"question_id": 1, "image": "a.jpg", "text": "?", "label": "Yes"}], "has label 'Yes'"),
        ([{"question_id": 1, "image": "a.jpg", "text": "?", "label": "yes"}] * 2, "line 2 repeats question_id 1"),
        ([], "holds no question"),
    ]:
        write_lines(tmp_path / "coco_pope_random.json", rows)
        with pytest.raises(Fault) as caught:
            POPE(data=tmp_path).questions()
        assert sentence in str(caught.value)


def test_missing_files_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="holds none of coco_pope_.* fetch pope"):
        POPE(data=tmp_path).questions()
    for splits in (["rnadom"], []):
        with pytest.raises(ValidationError, match="splits"):
            POPE(data=tmp_path, splits=splits)
