"""MM-Vet on the official files' form."""

from __future__ import annotations

import json
import math

import pytest
from servers import ChatServer, Say, last_text

from povid.benchmarks import mm_vet
from povid.benchmarks.judge import Judge
from povid.benchmarks.mm_vet import MMVet
from povid.fault import Fault

ANY = MMVet(data="data")  # what reads no official file


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    rows = {
        f"v1_{n}": {"imagename": f"v1_{n}.png", "question": f"Q{n}?", "answer": "-1<AND>-5<OR>x", "capability": needs}
        for n, needs in enumerate([["ocr", "math"], ["rec"], ["math", "ocr"], ["rec", "know"]])
    }
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    return tmp_path


def judged(data, script, runs=1):
    with ChatServer(lambda body, number: Say(script(last_text(body), body))) as server:
        judge = Judge(cache=data / "r.jsonl", base_url=server.url)
        return MMVet(data=data, runs=runs).score(MMVet(data=data).questions(), ["a", "b", "c", "d"], judge), server


def test_grades():
    for reply, grade in [
        ("0.5", 0.5),
        ("1", 1.0),
        ("0.4\n", 0.4),
        ("0.9 |", 0.9),
        ("1.1", None),
        ("-0.1", None),
        (" 0.5", None),
        ("", None),
        ("about 0.5", None),
        ("inf", None),
        ("0.5|", None),
    ]:
        assert mm_vet.parse(reply) == grade
    assert math.isnan(mm_vet.parse("nan"))


def test_score_by_hand(data):
    """Grades 0.5, 1.0, 0.2 and one never readable, officially 0: total 100 x 1.7 / 4 = 42.5 (corrected 56.7).
    rec: (1 + 0) / 2 = 50; ocr and math: (0.5 + 0.2) / 2 = 35; know: 0. Sets: math_ocr 35, rec 100, know_rec 0."""

    def script(text, body):
        grades = {"Q0": "0.5", "Q1": "1.0", "Q2": "0.2", "Q3": "good"}
        return next(grade for question, grade in grades.items() if question in text)

    score, server = judged(data, script)
    scores = score.scores
    assert (scores["total"], scores["std"], scores["corrected"]["total"]) == (42.5, 0.0, 56.7)
    assert scores["by_capability"] == {"rec": 50.0, "ocr": 35.0, "math": 35.0, "know": 0.0}
    assert scores["by_integration"] == {"math_ocr": 35.0, "rec": 100.0, "know_rec": 0.0}
    assert "know" not in scores["corrected"]["by_capability"] and scores["corrected"]["by_capability"]["rec"] == 100.0
    first, *again = [body for body in server.requests if "Q3?" in last_text(body)]
    assert last_text(first).endswith("\nQ3? | -1 <AND> -5 <OR> x | d | ")
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-4-0613", 0.0, 3)
    assert [body["temperature"] for body in again] == [0.0, 0.5, 1.0, 1.5]
    assert all(last_text(body).startswith(last_text(first)) and "digit" in last_text(body) for body in again)


def test_sums_round_as_in_the_official_script(tmp_path, monkeypatch):
    """Added one after the other, these grades make 4.8999999999999995 and 61.2; sum() gives 4.9 and 61.3 from Python
    3.12 on, for which math.fsum stands in here."""
    monkeypatch.setattr(mm_vet, "sum", math.fsum, raising=False)
    grades = [1.0, 0.9, 0.9, 0.3, 1.0, 0.6, 0.0, 0.2]
    rows = {
        f"v1_{n}": {"imagename": "a.png", "question": f"Q{n}?", "answer": "x", "capability": ["rec"]}
        for n in range(len(grades))
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))

    def reply(body, number):
        return Say(next(str(grade) for n, grade in enumerate(grades) if f"Q{n}?" in last_text(body)))

    benchmark = MMVet(data=tmp_path)
    with ChatServer(reply) as server:
        judge = Judge(cache=tmp_path / "r.jsonl", base_url=server.url)
        scores = benchmark.score(benchmark.questions(), ["a"] * len(grades), judge).scores
    assert (scores["total"], scores["by_capability"], scores["by_integration"]) == (61.2, {"rec": 61.2}, {"rec": 61.2})


def test_insisting_helps(data):
    score, _ = judged(data, lambda text, body: "0.3" if body["temperature"] == 0.5 else "well")
    assert score.scores["total"] == 30.0 and score.scores["unreadable_grades"] == 0 and "corrected" not in score.scores


def test_nan_is_a_grade_to_the_official_script_and_infinity_is_not(data):
    """Q1 gets nan, which the official script keeps: total, rec and its set print nan there. The figures here leave it
    out: (1 + 0.4 + 0.4) / 3, 60.0; rec is Q3's 0.4; of the set nothing is left. Q0 gets inf and is asked again."""

    def script(text, body):
        if "Q1?" in text:
            return "nan"
        if "Q0?" in text:
            return "inf" if "digit" not in text else "1.0"
        return "0.4"

    score, server = judged(data, script)
    scores = score.scores
    assert sum("Q1?" in last_text(body) for body in server.requests) == 1
    assert sum("Q0?" in last_text(body) for body in server.requests) == 2
    assert (scores["total"], scores["by_capability"]["ocr"], scores["by_capability"]["rec"]) == (60.0, 70.0, 40.0)
    assert scores["by_integration"] == {"math_ocr": 70.0, "rec": None, "know_rec": 40.0}
    assert scores["corrected"]["total"] == 60.0 and (scores["unreadable_grades"], scores["nan_grades"]) == (1, 1)
    assert score.records[1]["grades"] == [None] and "grades of nan: 1" in ANY.notes(score)[0]
    json.dumps([scores, score.records], allow_nan=False)


def test_runs_are_averaged(data):
    """Two runs of 4 equal grades, 0.4 then 0.6: totals 40 and 60, mean 50, standard deviation 10. The second run is a
    new sample, so it is asked anew although the request is the same."""
    asked = []

    def script(text, body):
        asked.append(text)
        return "0.4" if len(asked) <= 4 else "0.6"

    score, _ = judged(data, script, runs=2)
    assert (score.scores["total"], score.scores["std"], len(asked)) == (50.0, 10.0, 8)
    assert score.scores["judge"]["runs"] == 2 and score.records[0]["grades"] == [0.4, 0.6]


def test_a_judge_that_answers_prose_gives_no_score(data):
    with pytest.raises(Fault, match="mm_vet: none of the 4 replies"):
        judged(data, lambda text, body: "Right!")


def test_official_file_llavas_file_and_back(data):
    questions = MMVet(data=data).questions()
    assert questions[0].text == "Q0?" and questions[0].image == data / "mm-vet" / "images" / "v1_0.png"
    file = ANY.write_official(questions, ["a", "b", "", "d"], data / "out")
    assert json.loads(file.read_text()) == {"v1_0": "a", "v1_1": "b", "v1_2": "", "v1_3": "d"}
    assert ANY.read_answers(file, questions) == ["a", "b", "", "d"]
    llava = data / "llava.jsonl"
    llava.write_text("\n".join(json.dumps({"question_id": n, "text": str(n)}) for n in (2, 0, 3, 1)))
    assert ANY.read_answers(llava, questions) == ["0", "1", "2", "3"]


def test_bad_answer_files(data):
    for content, sentence in [
        ('{"v1_0": "a"}', "answers 1 of 4 questions, missing v1_1, v1_2, v1_3"),
        ('{"v1_0": "a", "v1_9": "b"}', "v1_9 answers question 'v1_9', which is not one of the 4"),
        ('{"v1_0": ["a"]}', "v1_0 has \\['a'\\] as its answer"),
        ('{"v1_0": "a"', "line 1 is not JSON"),
    ]:
        (data / "a.json").write_text(content)
        with pytest.raises(Fault, match=sentence):
            ANY.read_answers(data / "a.json", MMVet(data=data).questions())


def test_bad_data(tmp_path):
    with pytest.raises(Fault, match="mm-vet.json.*fetch mm_vet"):
        MMVet(data=tmp_path).questions()
    (tmp_path / "mm-vet.json").write_text('{"v1_0": {"imagename": "a.png", "question": "Q?", "capability": []}}')
    with pytest.raises(Fault, match="mm-vet.json v1_0 has no 'answer'"):
        MMVet(data=tmp_path).questions()
