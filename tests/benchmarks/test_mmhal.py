"""MMHal-Bench on records in the official template's form."""

from __future__ import annotations

import json

import pytest
from servers import ChatServer, Say, last_text

from povid.benchmarks.judge import Judge
from povid.benchmarks.mmhal import MMHal
from povid.fault import Fault

ANY = MMHal(data="data")  # what reads no official file

TYPES = ["attribute", "adversarial", "comparison", "counting"]


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "question_type": kind,
            "question_topic": "food",
            "image_id": f"id{number}",
            "image_src": f"https://example.org/a/{number}_o.jpg",
            "image_content": ["Apple", "Bowl"],
            "question": f"Question {number}?",
            "gt_answer": f"Truth {number}.",
            "model_answer": "",
        }
        for number, kind in enumerate(TYPES)
    ]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "2_o.jpg").write_bytes(b"x")
    return tmp_path


def judged(data, replies, questions, answers):
    def script(body, number):
        return Say(next(reply for key, reply in replies.items() if f"Truth {key}." in last_text(body)))

    with ChatServer(script) as server:
        judge = Judge(cache=data / "replies.jsonl", base_url=server.url, backoff=0.001)
        return ANY.score(questions, answers, judge), server


def test_questions_are_bare_and_pictures_are_found_by_the_last_part_of_their_address(data):
    questions = MMHal(data=data).questions()
    assert [question.text for question in questions][:2] == ["Question 0?", "Question 1?"]
    assert questions[2].image == data / "images" / "2_o.jpg"


def test_score_by_hand(data):
    """Ratings 6, 2, then two unreadable replies: "Rating: 4" named twice with different numbers, and prose.
    Official: (6 + 2 + 0 + 0) / 4 = 2.0; below 3 are three of four: 0.75.
    Corrected: the last rating named counts, prose is left out: (6 + 2 + 5) / 3 = 13/3; one of three is below 3."""
    questions = MMHal(data=data).questions()
    replies = {
        0: "Fine.\n- Rating: 6, very informative",
        1: "It is wrong. RATING: 2",
        2: "Between rating: 4 and more. Rating: 5, very informative",
        3: "I would say it is good.",
    }
    score, server = judged(data, replies, questions, ["a", "b", "c", "d"])
    assert score.scores["score"] == 2.0 and score.scores["hallucination_rate"] == 0.75
    assert score.scores["by_type"] == {"attribute": 6, "adversarial": 2, "comparison": 0, "counting": 0}
    assert score.scores["corrected"]["score"] == pytest.approx(13 / 3)
    assert score.scores["corrected"]["hallucination_rate"] == pytest.approx(1 / 3)
    assert score.scores["unreadable_replies"] == 2
    assert [record["readable"] for record in score.records] == [True, True, False, False]
    assert score.scores["judge"]["model"] == "gpt-4-0314"
    request = next(body for body in server.requests if "Truth 1." in last_text(body))
    assert (request["model"], request["temperature"], len(request["messages"])) == ("gpt-4-0314", 0.0, 1)
    sections = last_text(request).split("### ")[-4:]
    assert [section.split("\n")[1] for section in sections] == ["Apple, Bowl", "Question 1?", "Truth 1.", "b"]


def test_the_same_rating_said_twice_is_one_rating_and_markdown_is_read_only_by_the_corrected_rule(data):
    """Official: 3 and 0 -> (3 + 0 + 4 + 4) / 4 = 2.75; corrected: 3 and 5 -> 4.0."""
    replies = {0: "rating: 3 ... so Rating: 3", 1: "**Rating**: 5", 2: "Rating: 4", 3: "Rating: 4"}
    score, _ = judged(data, replies, MMHal(data=data).questions(), ["a", "b", "c", "d"])
    assert score.scores["score"] == 2.75 and score.scores["corrected"]["score"] == 4.0


def test_a_judge_that_never_keeps_to_the_form_gives_no_score(data):
    with pytest.raises(Fault, match="none of the 4 replies of the judge gpt-4-0314"):
        judged(
            data, dict.fromkeys(range(4), "Sure! Here is my view."), MMHal(data=data).questions(), ["a", "b", "c", "d"]
        )


def test_answers_in_any_order_and_the_template_comes_back(data, tmp_path):
    questions = MMHal(data=data).questions()
    file = ANY.write_official(questions, ["a", "b", "", "d"], tmp_path / "out")
    rows = json.loads(file.read_text())
    assert rows[3]["model_answer"] == "d" and rows[3]["question_type"] == "counting" and len(rows) == 4
    file.write_text(json.dumps(rows[::-1]))
    assert ANY.read_answers(file, questions) == ["a", "b", "", "d"]
    file.write_text("".join(json.dumps({"question_id": n, "text": str(n)}) + "\n" for n in (3, 1, 0, 2)))
    assert ANY.read_answers(file, questions) == ["0", "1", "2", "3"]


def test_bad_answer_files(data):
    for change, sentence in [
        (lambda rows: rows[:-1], "answers 3 of 4 questions, missing 3"),
        (lambda rows: [*rows, rows[0]], "record 5 answers question .* a second time"),
        (lambda rows: [{**rows[0], "question": "Else?"}, *rows[1:]], "record 1 answers question 'id0 Else\\?', which"),
        (
            lambda rows: [{k: v for k, v in rows[0].items() if k != "model_answer"}, *rows[1:]],
            "record 1 has no 'model_ans",
        ),
        (lambda rows: [{**rows[0], "model_answer": None}, *rows[1:]], "has None as its answer"),
    ]:
        questions = MMHal(data=data).questions()
        file = data / "answers.json"
        file.write_text(json.dumps(change(json.loads((data / "response_template.json").read_text()))))
        with pytest.raises(Fault, match=sentence):
            ANY.read_answers(file, questions)


def test_what_is_missing_is_said_with_its_cure(tmp_path, monkeypatch):
    with pytest.raises(Fault, match="response_template.json.*fetch mmhal"):
        MMHal(data=tmp_path).questions()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(Fault, match="no key for gpt-4-0314: .*OPENAI_API_KEY is not set; set it, or give the base_url"):
        Judge(cache=tmp_path / "r.jsonl").endpoint(ANY)
