"""MMBench on a small table in the official form."""

from __future__ import annotations

import base64
import json
import random

import openpyxl
import pandas
import pytest
from servers import ChatServer, Say

from povid.benchmarks import mmbench
from povid.benchmarks.judge import Judge
from povid.benchmarks.mmbench import MMBench
from povid.fault import Fault

ANY = MMBench(data="data")  # what reads no official file

COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]
PICTURE = base64.b64encode(b"jpeg").decode()


def row(index, a, b, answer, *, c="", hint="", category="cat1", image=PICTURE):
    return [index, "What is it?", hint, a, b, c, "", answer, category, image, "web", f"l2 {category}", "", "dev"]


ROWS = [
    row(2, "cat", "dog", "A", hint="Look."),
    row(5, "red", "blue", "B", c="green", category="cat2"),
    row(1_000_002, "dog", "cat", "B"),
    row(1_000_005, "blue", "green", "A", c="red", category="cat2"),
    row(2_000_005, "green", "red", "C", c="blue", category="cat2"),
]


def table(folder, rows=ROWS, columns=COLUMNS):
    pandas.DataFrame(rows, columns=columns).to_csv(folder / "mmbench_dev_20230712.tsv", sep="\t", index=False)
    return folder


def test_prompt_options_and_picture(tmp_path):
    questions = MMBench(data=table(tmp_path)).questions()
    assert questions[0].text == (
        "Look.\nWhat is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert questions[1].text.startswith("What is it?\nA. red\nB. blue\nC. green\nAnswer")
    assert questions[0].image == b"jpeg" and [q.id for q in questions] == [2, 5, 1000002, 1000005, 2000005]


def test_newer_tables_keep_one_picture_for_all_rotations(tmp_path):
    rows = [row(2, "cat", "dog", "A"), row(1_000_002, "dog", "cat", "B", image="2")]
    assert [question.image for question in MMBench(data=table(tmp_path, rows)).questions()] == [b"jpeg", b"jpeg"]


def test_rules():
    for answer, option in [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("C).", "C"),
        (":B", "B"),
        ("the answer is B", "B"),
        ("A cat", "A"),
        ("A small grey cat", None),
        ("The option is B not C", None),
        ("It is a red thing", "A"),
        ("red or blue", None),
        ("It is RED.", "A"),
        ("E", "E"),
        ("b", None),
        ("", None),
        ("nan", None),
        ("Answer: B.", "B"),
        ("[B]", None),
        ("It is A. in this picture here", "A"),
        ("B. Failed to obtain answer via API", None),
        ("B. Failed to obtain answer via API (red)", "A"),
    ]:
        assert mmbench.parse(answer, {"A": "red", "B": "blue", "C": "green"}) == option


def test_score_by_hand(tmp_path):
    """Base 2 (A, then B): "A" and "dog"... both right is needed: "A" and "It is a cat" (text of B): hit.
    Base 5 (B, A, C): right, right, wrong: no hit. Accuracy 1/2; cat1 100, cat2 0."""
    questions = MMBench(data=table(tmp_path)).questions()
    score = ANY.score(questions, ["A", "B", "It is a cat", "A. blue", "green"])
    assert score.scores["accuracy"] == 50.0
    assert score.scores["by_category"] == {"cat1": 100.0, "cat2": 0.0}
    assert score.scores["by_l2_category"] == {"l2 cat1": 100.0, "l2 cat2": 0.0}
    assert (score.scores["questions"], score.scores["rows"], score.scores["judge"]) == (2, 5, None)
    assert [record["parsed"] for record in score.records] == ["A", "B", "B", "A", "A"]
    assert "no judge" in score.scores["note"] and "corrected" not in score.scores


def test_without_a_judge_an_unmatched_answer_is_wrong(tmp_path):
    score = ANY.score(MMBench(data=table(tmp_path)).questions(), ["A", "B", "a pet", "A", "C"])
    assert score.scores["accuracy"] == 50.0 and score.records[2]["correct"] is False


def test_the_judge_matches_the_rest_and_is_spared_where_a_rotation_is_wrong_already(tmp_path):
    """Base 2: "a pet" is matched to B by the judge: hit. Base 5 is lost by its first answer: "sky" is not asked."""
    questions = MMBench(data=table(tmp_path)).questions()
    with ChatServer(lambda body, n: Say("Your output: B")) as server:
        judge = Judge(cache=tmp_path / "r.jsonl", base_url=server.url)
        score = ANY.score(questions, ["A", "A", "a pet", "sky", "C"], judge)
    assert score.scores["accuracy"] == 50.0 and score.scores["matched_by_judge"] == 1 and len(server.requests) == 1
    assert (server.requests[0]["model"], server.requests[0]["temperature"]) == ("gpt-3.5-turbo-0613", 0.0)
    assert "Question: What is it??\nOptions: There are several options:\nA. dog\nB. cat\nAnswer: a pet" in str(
        server.requests[0]["messages"][0]["content"]
    )
    assert score.records[2]["by"] == "judge"


def test_a_judge_that_says_that_it_failed_is_asked_again(tmp_path):
    """Even where an option's text is part of that sentence."""
    questions = MMBench(data=table(tmp_path, [row(2, "answer", "dog", "B")])).questions()
    replies = ["Failed to obtain answer via API", "B"]
    with ChatServer(lambda body, n: Say(replies[n])) as server:
        score = ANY.score(questions, ["hm"], Judge(cache=tmp_path / "r.jsonl", base_url=server.url))
    assert score.scores["accuracy"] == 100.0 and len(server.requests) == 2


def test_after_three_unreadable_replies_an_option_is_drawn_and_the_corrected_score_has_none(tmp_path):
    """The official seed 2680 is drawn from once for each unmatched answer, in the order of the questions."""
    chance = random.Random(2680)
    first, second = ("ABCDE"[chance.randint(0, 4)] for _ in range(2))
    rows = [row(index, "cat", "dog", drawn if drawn in "AB" else "A") for index, drawn in ((2, first), (5, second))]
    questions = MMBench(data=table(tmp_path, rows)).questions()
    with ChatServer(lambda body, n: Say("I cannot tell")) as server:
        score = ANY.score(questions, ["hm", "ah"], Judge(cache=tmp_path / "r.jsonl", base_url=server.url))
    assert len(server.requests) == 6
    assert [record["parsed"] for record in score.records] == [first, second]
    assert score.scores["accuracy"] == 50.0 * ((first in "AB") + (second in "AB"))
    assert score.scores["corrected"]["accuracy"] == 0.0 and score.scores["random"] == 2


def test_nothing_more_is_drawn_for_a_question_that_is_lost_already(tmp_path):
    """The first draw misses the first rotation of question 2, so its second rotation is not drawn for, and the second
    draw goes to question 5, where it is made to be the answer."""
    chance = random.Random(2680)
    first, second = ("ABCDE"[chance.randint(0, 4)] for _ in range(2))
    assert second in "ABCD"
    right = "A" if first != "A" else "B"
    rows = [row(2, "cat", "dog", right), row(5, "cat", "dog", second, c="red"), row(1_000_002, "dog", "cat", "B")]
    rows[1][6] = "blue"  # option D
    questions = MMBench(data=table(tmp_path, rows)).questions()
    with ChatServer(lambda body, n: Say("I cannot tell")) as server:
        score = ANY.score(questions, ["hm", "ah", "oh"], Judge(cache=tmp_path / "r.jsonl", base_url=server.url))
    assert [record["parsed"] for record in score.records] == [first, second, None]
    assert score.scores["accuracy"] == 50.0 and score.scores["random"] == 2


def test_submission_sheet_column_for_column_and_back(tmp_path):
    questions = MMBench(data=table(tmp_path)).questions()
    answers = ["A", "B\x01", "It is a cat", "nan", "\ud83d"]
    file = ANY.write_official(questions, answers, tmp_path / "out")
    rows = list(openpyxl.load_workbook(file).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (2, "What is it?", "cat", "dog", None, None, "A", "A", "dev") and len(rows) == 6
    assert ANY.read_answers(file, questions) == ["A", "B", "It is a cat", "nan", "?"]
    llava = [json.loads(line) for line in (tmp_path / "out" / "mmbench_answers.jsonl").read_text().splitlines()]
    signs = ["=B", "=1+1", "#N/A", "+A", "'A"]
    assert ANY.read_answers(ANY.write_official(questions, signs, tmp_path / "signs"), questions) == signs
    assert llava[1]["option_char"] == ["A", "B", "C"] and llava[1]["options"] == ["red", "blue", "green"]
    assert ANY.read_answers(tmp_path / "out" / "mmbench_answers.jsonl", questions)[1] == "B\x01"


def test_an_incomplete_file_is_scored_as_officially_and_corrected_beside(tmp_path):
    """All given answers are right. JSON Lines without index 1000002: its cell is empty, read as "nan", which names no
    option, so question 2 is lost and question 5 is not: 50. Where the option is "n", "nan" names it: 100, corrected 50.
    A sheet without that row: question 2 is scored by its other row: 100, corrected 50. Without row 2 the question is
    left out: 100 of one question, corrected 50 of two."""
    right = {2: "A", 5: "B", 1_000_002: "B", 1_000_005: "A", 2_000_005: "C"}

    def scored(file, without, rows=ROWS):
        benchmark = MMBench(data=table(tmp_path, rows))
        given = {index: answer for index, answer in right.items() if index != without}
        if file.suffix == ".jsonl":
            file.write_text("\n".join(json.dumps({"question_id": i, "text": a}) for i, a in given.items()))
        else:
            cells = {"index": list(given), "prediction": list(given.values())}
            pandas.DataFrame(cells).to_csv(file, index=False)
        score = benchmark.score_file(file, benchmark.questions())
        assert ("unanswered" in score.scores) == bool(benchmark.notes(score)) == (without is not None)
        return score, [score.scores, score.scores.get("corrected", {})]

    lines, sheet = tmp_path / "a.jsonl", tmp_path / "a.csv"
    for file in (lines, sheet):
        assert [part.get("accuracy") for part in scored(file, None)[1]] == [100.0, None]
    score, found = scored(lines, 1_000_002)
    assert [(part["accuracy"], part["questions"]) for part in found] == [(50.0, 2), (50.0, 2)]
    assert score.records[2]["answer"] is None and score.scores["unanswered"] == 1
    compass = [ROWS[0], ROWS[1], row(1_000_002, "e", "n", "B"), *ROWS[3:]]
    assert [part["accuracy"] for part in scored(lines, 1_000_002, compass)[1]] == [100.0, 50.0]
    assert [(part["accuracy"], part["questions"]) for part in scored(sheet, 1_000_002)[1]] == [(100.0, 2), (50.0, 2)]
    assert [(part["accuracy"], part["questions"]) for part in scored(sheet, 2)[1]] == [(100.0, 1), (50.0, 2)]
    sheet.write_text("index,prediction\n2,A\n1000002,\n5,B\n1000005,A\n2000005,C\n")
    assert MMBench(data=tmp_path).score_file(sheet, MMBench(data=table(tmp_path)).questions()).scores["unanswered"] == 1
    sheet.write_text("index,prediction\n1000002,B\n")
    with pytest.raises(Fault, match=r"a.csv answers no question of the table"):
        MMBench(data=tmp_path).score_file(sheet, MMBench(data=tmp_path).questions())


def test_bad_answers_and_bad_tables(tmp_path):
    questions = MMBench(data=table(tmp_path)).questions()
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(Fault, match="a.xlsx is not a readable sheet"):
        ANY.read_answers(tmp_path / "a.xlsx", questions)
    pandas.DataFrame({"index": [2, 5]}).to_excel(tmp_path / "b.xlsx", index=False)
    with pytest.raises(Fault, match="b.xlsx has the columns index but needs index and prediction"):
        ANY.read_answers(tmp_path / "b.xlsx", questions)
    pandas.DataFrame({"index": [2, 5], "prediction": ["A", "B"]}).to_excel(tmp_path / "c.xlsx", index=False)
    with pytest.raises(Fault, match="c.xlsx answers 2 of 5 questions, missing 1000002"):
        ANY.read_answers(tmp_path / "c.xlsx", questions)
    for rows, sentence in [
        ([row(2, "cat", "dog", "C")], "index 2 has the answer 'C' and the options A, B"),
        ([row(2, "cat", "dog", "A", image="@@")], "index 2 has no base64 image"),
        ([row(1_000_002, "cat", "dog", "A")], "rotated copy of index 2 but not index 2 itself"),
    ]:
        with pytest.raises(Fault, match=sentence):
            MMBench(data=table(tmp_path, rows)).questions()
    with pytest.raises(Fault, match="has no column 'answer'"):
        MMBench(
            data=table(tmp_path, [[*ROWS[0][:7], *ROWS[0][8:]]], [name for name in COLUMNS if name != "answer"])
        ).questions()
    with pytest.raises(Fault, match="fetch mmbench"):
        MMBench(data=tmp_path / "out" if (tmp_path / "out").mkdir() is None else tmp_path).questions()
