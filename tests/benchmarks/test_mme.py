"""MME on files in the official layouts."""

from __future__ import annotations

import json

import pytest

from povid.benchmarks import mme
from povid.benchmarks.mme import MME
from povid.fault import Fault

ANY = MME(data="data")  # what reads no official file

ASK = "Please answer yes or no."
ROWS = {
    "existence": [
        ("1.jpg", f"Is there a dog?  {ASK}", "Yes"),
        ("1.jpg", f"Is there a cat? {ASK}", "No"),
        ("2.jpg", f"Is there a car? {ASK}", "Yes"),
        ("2.jpg", f"Is there a bus? {ASK}", "No"),
    ],
    "code_reasoning": [("3.png", f"Is it 1? {ASK}", "Yes"), ("3.png", f"Is it 2? {ASK}", "No")],
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "eval_tool" / "Your_Results"
    folder.mkdir(parents=True)
    for subtask, rows in ROWS.items():
        (folder / f"{subtask}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    return tmp_path


def test_prompt_and_pictures(data):
    questions = MME(data=data).questions()
    assert questions[0].text == "Is there a dog?\nAnswer the question using a single word or phrase."
    assert [question.id for question in questions][:3] == ["existence/1/0", "existence/1/1", "existence/2/0"]
    folder = data / "MME_Benchmark_release_version" / "MME_Benchmark" / "code_reasoning"
    folder.mkdir(parents=True)
    (folder / "3.png").write_bytes(b"x")
    assert MME(data=data).questions()[-1].image == folder / "3.png"


def test_the_release_alone_is_enough(tmp_path):
    release = tmp_path / "MME_Benchmark_release_version"
    for subtask, place in {"existence": "", "artwork": "questions_answers_YN"}.items():
        folder = release / subtask / place
        folder.mkdir(parents=True)
        (folder / "9.txt").write_text(f"Is it a? {ASK}\tYes\nIs it b? {ASK}\tNo\n")
        pictures = release / subtask / ("images" if place else "")
        pictures.mkdir(exist_ok=True)
        (pictures / "9.png").write_bytes(b"x")
    questions = MME(data=tmp_path).questions()
    assert [question.meta["question_id"] for question in questions] == ["existence/9.png"] * 2 + ["artwork/9.png"] * 2
    assert questions[2].image == release / "artwork" / "images" / "9.png" and questions[3].meta["label"] == "No"


def test_parsers():
    for answer, official, corrected in [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("NO", "no", "no"),
        ("Yes, there is", "yes", "yes"),
        ("Now", "no", "other"),
        ("Not sure", "no", "other"),
        ("None", "no", "other"),
        (" yes", "yes", "yes"),
        ("  yes", "other", "yes"),
        ("\nYes", "yes", "yes"),
        ("", "other", "other"),
        ("It is no", "other", "other"),
        ("I know", "other", "other"),
        ("Eyes", "yes", "other"),
        ("**Yes**", "other", "yes"),
        ("Nyes", "yes", "other"),
    ]:
        assert (mme.parse(answer), mme.parse_corrected(answer)) == (official, corrected)


def test_score_by_hand(data):
    """Existence: image 1 yes/no both right; image 2 "yes" right and "It is not there" (other) wrong:
    accuracy 3/4, both right 1/2, score 75 + 50 = 125. Code: "Yes" right, "Nowhere" read as no, right:
    100 + 100 = 200; corrected "Nowhere" is other: 50 + 0 = 50. Sums need all subtasks, so they are withheld."""
    answers = ["Yes", "no", "yes", "It is not there", "Yes", "Nowhere"]
    scores = ANY.score(MME(data=data).questions(), answers).scores
    assert scores["subtasks"]["existence"] == {"score": 125.0, "accuracy": 75.0, "accuracy_plus": 50.0, "questions": 4}
    assert scores["subtasks"]["code_reasoning"]["score"] == 200.0
    assert scores["corrected"]["subtasks"]["code_reasoning"]["score"] == 50.0
    assert (scores["perception"], scores["cognition"], scores["other"]) == (None, None, 1)


def test_sums(tmp_path):
    """All right everywhere but count, where every answer is "yes": half right, no image right twice: 50 + 0.
    Perception 9 x 200 + 50 = 1850, cognition 4 x 200 = 800."""
    for subtask in mme.PERCEPTION + mme.COGNITION:
        (tmp_path / f"{subtask}.txt").write_text(f"1.jpg\tA? {ASK}\tYes\n1.jpg\tB? {ASK}\tNo\n")
    questions = MME(data=tmp_path).questions()
    answers = ["yes" if question.meta["subtask"] == "count" else question.meta["label"] for question in questions]
    scores = ANY.score(questions, answers).scores
    assert (scores["perception"], scores["cognition"], scores["questions"]) == (1850.0, 800.0, 28)


def test_official_files_and_back(data, tmp_path):
    questions = MME(data=data).questions()
    answers = ["Yes", "a\tb\nc", "", "Yes", "no\ud83d", "no"]
    folder = ANY.write_official(questions, answers, tmp_path / "out")
    lines = (folder / "existence.txt").read_text().split("\n")
    assert lines[1] == f"1.jpg\tIs there a cat? {ASK}\tNo\ta b c" and len(lines) == 5
    assert ANY.read_answers(folder, questions) == ["Yes", "a b c", "", "Yes", "no?", "no"]


def test_llavas_layouts_are_read(data, tmp_path):
    """Its answers share a question_id between both questions of an image; its converter names the .txt, not the
    image, and writes one space before the phrase where the release has two."""
    questions = MME(data=data).questions()
    lines = [
        {"question_id": question.meta["question_id"], "prompt": question.text, "text": question.meta["label"]}
        for question in questions
    ]
    file = tmp_path / "llava.jsonl"
    file.write_text("\n".join(map(json.dumps, lines[::-1])))
    assert ANY.read_answers(file, questions) == ["Yes", "No"] * 3
    own = [{**line, "question_id": question.id} for line, question in zip(lines, questions)]
    file.write_text("\n".join(map(json.dumps, own)))
    assert ANY.read_answers(file, questions) == ["Yes", "No"] * 3
    folder = ANY.write_official(questions, ["Yes", "No"] * 3, tmp_path / "out")
    text = (folder / "existence.txt").read_text().replace(".jpg", ".txt").replace("  ", " ")
    (folder / "existence.txt").write_text(text)
    assert ANY.read_answers(folder, questions) == ["Yes", "No"] * 3


def test_bad_answer_files(data, tmp_path):
    for change, sentence in [
        (lambda text: text.replace("\tYes\tYes", "\tYes"), "existence.txt line 1 .* has 3 fields"),
        (lambda text: text.replace("\tYes\tYes", "\tYes\tYes\tno"), "has 5 fields"),
        (lambda text: "".join(text.splitlines(True)[:-1]), "answers 5 of 6 questions, missing existence/2/1"),
        (lambda text: text + text.splitlines(True)[0], "line 5 answers question .* a second time"),
        (
            lambda text: text.replace("a car", "a boat"),
            "line 3 answers question 'existence/2: Is there a boat\\?', which",
        ),
    ]:
        questions = MME(data=data).questions()
        folder = ANY.write_official(questions, ["Yes", "No"] * 3, tmp_path / "out")
        file = folder / "existence.txt"
        file.write_text(change(file.read_text()))
        with pytest.raises(Fault, match=sentence):
            ANY.read_answers(folder, questions)


def test_bad_data(tmp_path):
    with pytest.raises(Fault, match="fetch mme"):
        MME(data=tmp_path).questions()
    (tmp_path / "count.txt").write_text(f"1.jpg\tA? {ASK}\tYes\n2.jpg\tB? {ASK}\tNo\n")
    with pytest.raises(Fault, match="line 2 is about 2.jpg and the line before about 1.jpg"):
        MME(data=tmp_path).questions()
    (tmp_path / "count.txt").write_text(f"1.jpg\tA? {ASK}\tYes\n")
    with pytest.raises(Fault, match="odd number"):
        MME(data=tmp_path).questions()
