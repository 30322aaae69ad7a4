"""ScienceQA on problems in the official form."""

from __future__ import annotations

import json
import random

import pytest

from povid.benchmarks import science_qa
from povid.benchmarks.science_qa import ScienceQA
from povid.fault import Fault

ANY = ScienceQA(data="data")  # what reads no official file


@pytest.fixture
def data(tmp_path):
    def problem(answer, image=None, hint="", choices=("x", "y", "z")):
        return {
            "question": "Which  one?",
            "choices": list(choices),
            "answer": answer,
            "hint": hint,
            "image": image,
            "subject": "natural science",
            "split": "test",
        }

    problems = {
        "4": problem(1),
        "7": problem(0, "image.png", "Look."),
        "9": problem(2, "image.png"),
        "11": problem(0, "image.png", choices=("x", "y")),
        "12": problem(1, "image.png"),
        "99": problem(0),
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["4", "7", "9", "11", "12"], "val": ["99"]}))
    return tmp_path


def test_prompt(data):
    questions = ScienceQA(data=data).questions()
    assert [question.id for question in questions] == ["4", "7", "9", "11", "12"]
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert questions[0].text == "Which  one?\nA. x\nB. y\nC. z" + suffix and questions[0].image is None
    assert questions[1].text == "Context: Look.\nWhich  one?\nA. x\nB. y\nC. z" + suffix
    assert questions[1].image == data / "images" / "test" / "7" / "image.png"
    turns = [{"from": "human", "value": "Which?\nA. x\nB. y\n<image>"}, {"from": "gpt", "value": "A"}]
    (data / "llava_test_CQM-A.json").write_text(json.dumps([{"id": "7", "conversations": turns}]))
    assert ScienceQA(data=data).questions()[1].text.startswith("Which?\nA. x\nB. y\nAnswer with")


def test_prompts_without_llavas_file_follow_its_form(data):
    """Two hundred made-up problems against the form, spelled out: a line of context only where there is a hint, the
    question, a line for each option, the instruction; and nothing else."""
    draw = random.Random(3)
    words = ["Which", "Größe", "図", "Ω ≤ 5", "a  b", "Options:", "N/A", "C.", "Context: x", "1. 5", "line\nline", "?"]

    def text(count):
        return " ".join(draw.choice(words) for _ in range(count))

    problems = {
        str(n): {
            "question": text(draw.randint(1, 6)),
            "choices": [text(draw.randint(1, 3)) for _ in range(draw.randint(2, 5))],
            "answer": draw.randint(0, 1),
            "hint": draw.choice(["", " ", "\n", text(draw.randint(1, 9))]),
            "image": None,
        }
        for n in range(200)
    }
    (data / "problems.json").write_text(json.dumps(problems))
    (data / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    asked = {question.id: question.text for question in ScienceQA(data=data).questions()}
    assert len(asked) == 200
    with_hint = 0
    for name, problem in problems.items():
        expected = ""
        if problem["hint"].strip() != "":
            expected += "Context: " + problem["hint"] + "\n"
            with_hint += 1
        expected += problem["question"]
        for number in range(len(problem["choices"])):
            expected += "\n" + "ABCDE"[number] + ". " + problem["choices"][number]
        expected += "\nAnswer with the option's letter from the given choices directly."
        assert asked[name] == expected
    assert 30 < with_hint < 170 and {len(p["choices"]) for p in problems.values()} == {2, 3, 4, 5}


def test_a_problem_without_a_valid_answer_is_refused(data):
    problems = json.loads((data / "problems.json").read_text())
    for change in ({"choices": list("uvwxyz")}, {"answer": 3}, {"answer": -1}, {"answer": None}, {"choices": []}):
        (data / "problems.json").write_text(json.dumps(problems | {"4": problems["4"] | change}))
        with pytest.raises(Fault, match="problems.json question 4 has . choices and the answer"):
            ScienceQA(data=data).questions()


def test_parsers():
    for answer, official, corrected in [
        ("B", "B", "B"),
        ("B. y", "B", "B"),
        ("B.", None, "B"),
        ("(B) y", None, "B"),
        ("B) y", None, "B"),
        ("b", None, None),
        (" B", None, "B"),
        ("The answer is B.", "B", "B"),
        ("The answer is B", None, "B"),
        ("The answer is B, not C", "B", "B"),
        ("The answer is B. The answer is C.", None, None),
        ("The answer is B. Yes, The answer is B.", None, "B"),
        ("", None, None),
        ("A cat is a mammal", None, None),
        ("F. none", None, None),
        ("B.y", None, "B"),
    ]:
        assert (science_qa.parse(answer), science_qa.parse_corrected(answer)) == (official, corrected)


def test_score_by_hand(data):
    """Truth B (no image), A, C, A (two choices), B. Answers: "B" right; "A. x" right; "(C) z" fails officially;
    "C" is beyond two choices: wrong; "The answer is B." right. All: 3/5 = 60 %. With an image: 2/4 = 50 %.
    Corrected also reads "(C) z": 4/5 = 80 % and 3/4 = 75 %."""
    score = ANY.score(ScienceQA(data=data).questions(), ["B", "A. x", "(C) z", "C", "The answer is B."])
    assert (score.scores["accuracy"], score.scores["img_accuracy"], score.scores["img_questions"]) == (60.0, 50.0, 4)
    assert score.scores["corrected"] == {"accuracy": 80.0, "img_accuracy": 75.0, "img_questions": 4, "questions": 5}
    assert [record["parsed"] for record in score.records] == ["B", "A", None, "C", "B"]
    assert score.scores["failed_to_parse"] == 1


def test_an_image_only_file_counts_the_others_as_failed(data):
    """Four image questions right, the text question unanswered: IMG 100 %, all 4/5 = 80 %, as the official script."""
    questions = ScienceQA(data=data).questions()
    lines = [{"question_id": name, "text": text} for name, text in [("12", "B"), ("7", "A"), ("9", "C"), ("11", "A")]]
    file = data / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    answers = ANY.read_answers(file, questions)
    assert answers == ["", "A", "C", "A", "B"]
    scores = ANY.score(questions, answers).scores
    assert (scores["img_accuracy"], scores["accuracy"]) == (100.0, 80.0)


def test_an_incomplete_file_is_scored_as_officially(data):
    """Right answers to "4" (no image), "7" and "9" of five: all 3/5; of the two answered with an image 2/2, where the
    four with an image would give 2/4."""
    questions, file = ScienceQA(data=data).questions(), data / "answers.jsonl"
    lines = [{"question_id": name, "text": text} for name, text in [("9", "C"), ("4", "B"), ("7", "A")]]
    file.write_text("\n".join(map(json.dumps, lines)))
    score = ANY.score_file(file, questions)
    assert (score.scores["accuracy"], score.scores["img_accuracy"], score.scores["img_questions"]) == (60.0, 100.0, 2)
    assert score.scores["missing"] == 2 and score.scores["missing_counted"] == {"accuracy": 60.0, "img_accuracy": 50.0}
    assert "questions without an answer: 2" in ANY.notes(score)[0]
    whole = ANY.write_official(questions, list("BAAAA"), data / "out")
    score = ANY.score_file(whole, questions)
    assert score.scores == ANY.score(questions, list("BAAAA")).scores | {"missing": 0} and not ANY.notes(score)
    file.write_text(json.dumps({"question_id": "5", "text": "A"}))
    with pytest.raises(Fault, match="answers question '5', which is not one of the 5"):
        ANY.score_file(file, questions)


def test_official_file_and_back(data):
    questions = ScienceQA(data=data).questions()
    file = ANY.write_official(questions, list("ABCAB"), data / "out")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert ["<image>" in line["prompt"] for line in lines] == [False, True, True, True, True]
    assert set(lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert ANY.read_answers(file, questions) == list("ABCAB")
    file.write_text(json.dumps({"acc": 1.0, "results": {}, "outputs": dict.fromkeys(["12", "11", "9", "7", "4"], "A")}))
    assert ANY.read_answers(file, questions) == ["A"] * 5


def test_bad_answer_files(data):
    for lines, sentence in [
        (['{"question_id": "4", "text": "A"}'], "answers 1 of 5 questions, missing 7, 9, 11 and others"),
        (['{"question_id": "4", "text": "A"}'] * 2, "line 2 answers question '4' a second time, first at .* line 1"),
        (['{"question_id": "4", "te'], "line 1 is not JSON"),
        (['{"question_id": "5", "text": "A"}'], "line 1 answers question '5', which is not one of the 5"),
        (['{"question_id": "4", "answer": "A"}'], "line 1 has the keys answer, question_id, but an answer needs"),
    ]:
        (data / "answers.jsonl").write_text("\n".join(lines))
        with pytest.raises(Fault, match=sentence):
            ANY.read_answers(data / "answers.jsonl", ScienceQA(data=data).questions())


def test_bad_data(data):
    with pytest.raises(Fault, match="no split 'dev'; choose one of test, val"):
        ScienceQA(data=data, split="dev").questions()
    (data / "pid_splits.json").write_text(json.dumps({"test": ["1"]}))
    with pytest.raises(Fault, match="has no question 1, which pid_splits.json lists"):
        ScienceQA(data=data).questions()
    (data / "problems.json").write_text("[1]")
    with pytest.raises(Fault, match="not a single JSON object"):
        ScienceQA(data=data).questions()
