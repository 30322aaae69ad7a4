"""LLaVA-Bench on the official files' form."""

from __future__ import annotations

import json

import pytest
from servers import ChatServer, Say, last_text

from povid.benchmarks import llava_bench
from povid.benchmarks.judge import Judge
from povid.benchmarks.llava_bench import LLaVABench
from povid.fault import Fault

ANY = LLaVABench(data="data")  # what reads no official file


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path):
    categories = ["conv", "detail", "complex", "conv"]
    (tmp_path / "questions.jsonl").write_text(
        lines(
            {"question_id": n, "image": "001.jpg", "text": f"Q{n}?", "category": kind}
            for n, kind in enumerate(categories)
        )
    )
    (tmp_path / "context.jsonl").write_text(lines([{"image": "001.jpg", "caption": ["one", "two"]}]))
    (tmp_path / "answers_gpt4.jsonl").write_text(
        lines({"question_id": n, "text": f"Reference {n}."} for n in (3, 2, 1, 0))
    )
    return tmp_path


def judged(data, replies, answers=("a", "b", "c", "d")):
    def script(body, number):
        return Say(next(text for n, text in enumerate(replies) if f"Q{n}?" in last_text(body)))

    questions = LLaVABench(data=data).questions()
    with ChatServer(script) as server:
        return ANY.score(questions, answers, Judge(cache=data / "r.jsonl", base_url=server.url)), server


def test_first_line():
    for reply, pair in [
        ("8 9\nBecause", (8, 9)),
        ("8,9", (8, 9)),
        ("8.5 7", (8.5, 7)),
        ("8, 9", None),
        ("8  9", None),
        (" 8 9", None),
        ("Scores: 8 9", None),
        ("8", None),
        ("", None),
        ("8 9 ", None),
        ("8 nan", None),
        ("Sure!\n8 9", None),
        ("8 9\r", (8, 9)),
    ]:
        assert llava_bench.parse(reply) == pair


def test_score_by_hand(data):
    """conv: (9, 6) and prose, officially (-1, -1): means 4 and 2.5, 62.5. detail (8, 4): 50.0. complex (9, 9): 100.0.
    All: reference (9 + 8 + 9 - 1) / 4 = 6.25, ours (6 + 4 + 9 - 1) / 4 = 4.5: 72.0. Corrected without the prose:
    conv 66.7; all 19/26, from means rounded to three decimals 6.333 / 8.667: 73.1 (73.07)."""
    score, server = judged(data, ["9 6\nFine", "8,4", "9 9", "Both are good."])
    scores = score.scores
    assert {name: scores[name] for name in ("overall", "conv", "detail", "complex")} == {
        "overall": 72.0,
        "conv": 62.5,
        "detail": 50.0,
        "complex": 100.0,
    }
    assert scores["means_x10"]["overall"] == {"reference": 62.5, "model": 45.0}
    assert (scores["corrected"]["overall"], scores["corrected"]["conv"]) == (73.1, 66.7)
    assert scores["unreadable_replies"] == 1 and score.records[3]["scores"] is None
    request = next(body for body in server.requests if "Q1?" in last_text(body))
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt-4-0314", 0.2, 1024)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert last_text(request).startswith(
        "[Context]\none\ntwo\n\n[Question]\nQ1?\n\n[Assistant 1]\nReference 1.\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nb\n\n[End of Assistant 2]\n\n[Sys"
    )


def test_means_are_rounded_to_three_decimals_before_the_ratio(data):
    """Pairs (1, 2), (1, 2), (1.5, 3): means 1.1666... and 2.3333... are 1.167 and 2.333 first, and 233.3 / 1.167 is
    199.9 (199.914), where the ratio of the exact means would be 200.0."""
    (data / "questions.jsonl").write_text(
        lines({"question_id": n, "image": "001.jpg", "text": f"Q{n}?", "category": "conv"} for n in range(3))
    )
    (data / "answers_gpt4.jsonl").write_text(lines({"question_id": n, "text": "R"} for n in range(3)))
    score, _ = judged(data, ["1 2", "1 2", "1.5 3"], ["a", "b", "c"])
    assert score.scores["overall"] == 199.9 and "corrected" not in score.scores


def test_a_judge_that_answers_prose_gives_no_score(data):
    with pytest.raises(Fault, match=r"llava_bench: none of the 4 replies of the judge gpt-4-0314"):
        judged(data, ["Good."] * 4)


def test_a_category_of_which_no_reply_can_be_read(data):
    """Officially -1 / -1: 100.0, and in all (9 - 1 + 9 + 9) / 4 = 6.5 twice; corrected there is nothing of it."""
    score, _ = judged(data, ["9 9", "Good.", "9 9", "9 9"])
    assert (score.scores["detail"], score.scores["overall"], score.scores["means_x10"]["overall"]["model"]) == (
        100,
        100,
        65,
    )
    assert score.scores["corrected"]["detail"] is None and score.scores["corrected"]["overall"] == 100
    assert "replies of the judge that could not be read: 1" in ANY.notes(score)[0]


def test_nan_and_infinity_are_numbers_to_the_official_script(data):
    """conv: (8, 4) and (inf, 8) give 6 / inf, officially 0.0, and so does all; corrected 50.0. detail: (8, nan) is
    officially nan, and without it nothing is left. All with it: corrected (4 + 9 + 9) / (8 + 9 + 9), 84.6."""
    scores = judged(data, ["8 4", "9 9", "9 9", "inf 8"])[0].scores
    assert (scores["conv"], scores["overall"], scores["corrected"]["conv"]) == (0.0, 0.0, 50.0)
    assert scores["means_x10"]["conv"] == {"reference": None, "model": 60.0} and scores["unreadable_replies"] == 1
    scores = judged(data, ["8 4", "8 nan", "9 9", "9 9"], ("e", "f", "g", "h"))[0].scores
    assert (scores["detail"], scores["overall"], scores["corrected"]["overall"]) == (None, 84.6, 84.6)
    json.dumps(scores, allow_nan=False)


def test_official_file_and_back_in_any_order(data):
    questions = LLaVABench(data=data).questions()
    file = ANY.write_official(questions, ["a", "b", "c", "d"], data / "out")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3] and rows[0]["prompt"] == "Q0?"
    file.write_text(lines(rows[::-1]))
    assert ANY.read_answers(file, questions) == ["a", "b", "c", "d"]
    file.write_text(lines(rows)[:-9])
    with pytest.raises(Fault, match="line 4 is not JSON"):
        ANY.read_answers(file, questions)


def test_an_incomplete_file_is_scored_by_line_and_beside_it_by_id(data):
    """The judge gives 9 to "a", 6 to "b", 3 to "d" and 10 to the reference, whatever the question. Without the last
    answer: 9, 6, 3 over three tens, 60.0, for both. Without the second of four (a, b, c, d for 0 to 3), officially a, c
    and d answer questions 0, 1 and 2: conv is a's alone, 90.0; by their ids a and d are both conv, 60.0."""
    rates = {"a": 9, "b": 6, "c": 6, "d": 3}

    def script(body, number):
        answer = last_text(body).split("[Assistant 2]\n")[1][0]
        return Say(f"10 {rates[answer]}")

    def scored(*given):
        file = data / "answers.jsonl"
        file.write_text(lines({"question_id": n, "text": text, "answer_id": "x"} for n, text in given))
        benchmark = LLaVABench(data=data)
        with ChatServer(script) as server:
            score = benchmark.score_file(file, benchmark.questions(), Judge(cache=data / "r", base_url=server.url))
        return score.scores, benchmark.notes(score)

    scores, notes = scored((0, "a"), (1, "b"), (2, "c"), (3, "d"))
    assert not notes and not {"unanswered", "by_id"} & {*scores}
    scores, notes = scored((0, "a"), (1, "b"), (2, "d"))
    assert (scores["overall"], scores["unanswered"], scores["questions"]) == (60.0, 1, 3) and "by_id" not in scores
    assert "questions without an answer: 1" in notes[0]
    scores, notes = scored((0, "a"), (2, "c"), (3, "d"))
    assert (scores["conv"], scores["by_id"]["conv"], scores["by_id"]["overall"]) == (90.0, 60.0, 60.0)
    assert len(notes) == 2 and "by line" in notes[1] and "judge" not in scores["by_id"]
    scores, _ = scored((1, "b"), (0, "a"), (2, "c"), (3, "d"))
    assert (scores["detail"], scores["by_id"]["detail"]) == (90.0, 60.0) and "unanswered" not in scores
    (data / "answers.jsonl").write_text("")
    with pytest.raises(Fault, match="answers.jsonl holds no answer"):
        ANY.score_file(data / "answers.jsonl", LLaVABench(data=data).questions())


def test_bad_data(data):
    (data / "answers_gpt4.jsonl").write_text(lines([{"question_id": 0, "text": "R"}]))
    with pytest.raises(Fault, match="line 2 asks question 1"):
        LLaVABench(data=data).questions()
    (data / "context.jsonl").unlink()
    with pytest.raises(Fault, match="context.jsonl.*fetch llava_bench"):
        LLaVABench(data=data).questions()
