"""Judges against a server that answers slowly, with 429, 503, garbage and silence: the score stays the same."""

from __future__ import annotations

import json
import time

import pytest
from servers import ChatServer, Cut, Raw, Say, Silence, Status, last_text

from povid.benchmarks import mmhal
from povid.benchmarks.judge import Judge
from povid.benchmarks.mmhal import MMHal
from povid.fault import Fault
from povid.server.endpoint import NoReply

TROUBLE = [
    Status(429, headers={"Retry-After": "0.05"}),
    Status(503),
    Raw(b"<html>"),
    Raw(b'{"choices": []}'),
    Silence(),
    Cut(),
    Status(500),
]


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "question_type": "other",
            "question_topic": "x",
            "image_id": str(n),
            "image_src": f"a/{n}.jpg",
            "image_content": [],
            "question": f"Q{n}?",
            "gt_answer": f"Truth <{n}>",
            "model_answer": "",
        }
        for n in range(12)
    ]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    return MMHal(data=tmp_path).questions()


def rating(body) -> Say:
    number = int(last_text(body).split("Truth <")[1].split(">")[0])
    return Say(f"Because. Rating: {number % 7}, so", 100, 5)


def judge(server, folder, **more) -> Judge:
    settings = {"timeout": 0.3, "backoff": 0.001, "retries": 8, "concurrency": 4, **more}
    return Judge(cache=folder / "replies.jsonl", base_url=server.url, **settings)


def test_trouble_changes_nothing_and_nothing_is_paid_twice(questions, tmp_path):
    """Ratings 0..6 and 0..4: (21 + 10) / 12."""
    answers = ["yes"] * 12
    with ChatServer(lambda body, n: rating(body)) as server:
        calm = MMHal(data="data").score(questions, answers, judge(server, tmp_path / "calm")).scores
    seen: dict[str, int] = {}

    def script(body, number):
        times = seen[last_text(body)] = seen.get(last_text(body), -1) + 1
        time.sleep(0.01)
        if times < 2:
            return TROUBLE[(len(seen) + times) % len(TROUBLE)]
        return rating(body)

    with ChatServer(script) as server:
        stormy = (
            MMHal(data="data")
            .score(questions, answers, judge(server, tmp_path / "storm", input_price=10, output_price=30))
            .scores
        )
        sent = len(server.requests)
        again = MMHal(data="data").score(questions, answers, judge(server, tmp_path / "storm")).scores
        assert len(server.requests) == sent
    assert calm["score"] == stormy["score"] == again["score"] == pytest.approx(31 / 12)
    assert stormy["judging"]["replies"] == 12 and stormy["judging"]["tokens"] == 12 * 105
    assert stormy["judging"]["cost"] == pytest.approx(12 * (100 * 10 + 5 * 30) / 1e6)
    assert again["judging"] == stormy["judging"]  # from disk at what it cost then
    assert again["judge"] == stormy["judge"] == calm["judge"]  # runs of different cost can be averaged and compared


def test_a_judge_that_falls_silent_withholds_the_score_and_keeps_what_it_said(questions, tmp_path):
    with (
        ChatServer(lambda body, n: Silence() if "Q5?" in last_text(body) else rating(body)) as server,
        pytest.raises(NoReply, match="1 of 12 judgements of mmhal got no reply, the first: mmhal question 5"),
    ):
        MMHal(data="data").score(questions, ["yes"] * 12, judge(server, tmp_path, timeout=0.05, retries=1))
    kept = (tmp_path / "replies.jsonl").read_text().splitlines()
    assert len(kept) == 11 and all("Rating" in json.loads(line)["text"] for line in kept)


def test_a_refused_key_is_said_in_the_servers_words(questions, tmp_path):
    with (
        ChatServer(lambda body, n: Status(401, "Incorrect API key")) as server,
        pytest.raises(Fault, match="gpt-4-0314 at .*Incorrect API key"),
    ):
        MMHal(data="data").score(questions, ["yes"] * 12, judge(server, tmp_path))


def test_judgements_of_a_broken_server_are_asked_for_again_by_the_flag_that_the_message_names(
    questions, tmp_path, caplog
):
    """Half of the replies are of no use, then all; then the server is mended. One without a rating is never one."""
    broken: list[bool] = [True]

    def script(body, number):
        odd = int(last_text(body).split("Truth <")[1].split(">")[0]) % 2
        return Say("<think>") if broken[0] and odd else rating(body)

    def score(**more) -> dict:
        return MMHal(data="data").score(questions, ["yes"] * 12, judge(server, tmp_path, **more)).scores

    with ChatServer(script) as server:
        assert score()["unreadable_replies"] == 6
        broken[0] = False
        assert score()["unreadable_replies"] == 6 and len(server.requests) == 12
        assert "mmhal: judgements on disk that cannot be read: 6; if its server has been mended" in caplog.text
        assert "judge.ask_again=true (--judge-ask-again)" in caplog.text
        assert score(ask_again=True)["unreadable_replies"] == 0 and len(server.requests) == 18
        assert score()["score"] == pytest.approx(31 / 12) and len(server.requests) == 18
    with (
        ChatServer(lambda body, n: Say("<think>")) as server,
        pytest.raises(Fault, match="holds a readable score; choose another judge .* judge.ask_again=true"),
    ):
        score()


def test_ratings():
    for reply, official, corrected in [
        ("Rating: 5, very", 5, 5),
        ("rating: 0", 0, 0),
        ("Rating: 7", None, None),
        ("Rating:5", None, 5),
        ("Rating: 10", 1, None),
        ("Rating: 3 or Rating: 4", None, 4),
        ("", None, None),
        ("**Rating: 2**", 2, 2),
        ("Rating: [[6]]", None, 6),
        ("Rating: 4.5", 4, None),
    ]:
        assert (mmhal.parse(reply), mmhal.parse_corrected(reply)) == (official, corrected)


def test_the_model_can_be_chosen_and_stands_beside_the_score(questions, tmp_path):
    with ChatServer(lambda body, n: rating(body)) as server:
        mine = judge(server, tmp_path, model="my-judge")
        scores = MMHal(data="data").score(questions, ["yes"] * 12, mine).scores
    assert scores["judge"]["model"] == server.requests[0]["model"] == "my-judge"
    assert scores["judge"]["official_model"] == "gpt-4-0314"
