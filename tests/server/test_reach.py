"""A server that is away, silent, mended or no longer has the model, and what is said about it."""

from __future__ import annotations

import logging
import socket
import time
from datetime import date

import pytest
from servers import ChatServer, Say, Silence, Status

from povid.fault import Fault
from povid.server import endpoint as module
from povid.server import retired
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Request, Unreachable


def ask_for(text: str, **more) -> Request:
    return Request([{"role": "user", "content": text}], max_tokens=5, name=f"record {text}", **more)


def endpoint(address: str | None, folder, **more) -> Endpoint:
    settings = {"model": "m", "base_url": address, "backoff": 0.001, **more}
    return Endpoint(EndpointSettings(**settings), folder / "replies.jsonl")


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def nobody():
    """An address at which nothing listens, and nothing else will while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_nobody_there_is_told_at_once_and_stops_everything(tmp_path, nobody, caplog):
    """With the real back-off: two attempts and a pause of a second at most, for 20 requests, 8 at once."""
    asked = endpoint(nobody, tmp_path, backoff=1.0)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=f"^m at {nobody} cannot be reached .*refused.*start the server or correct"):
        list(asked.ask_all(ask_for(str(n)) for n in range(20)))
    assert time.monotonic() - started < 5
    with pytest.raises(Unreachable, match=f"^m at {nobody} cannot be reached .*refused"):
        asked.reach()
    with ChatServer(lambda body, n: Say("fine")) as server:
        endpoint(server.url, tmp_path).reach()  # that it lists no models does not matter
        assert not server.requests
    (line,) = said(caplog)
    assert line.startswith(f"m at {nobody} cannot be reached (") and "refused" in line and "once more in" in line


def test_a_connection_that_is_never_made_takes_ten_seconds_at_most(tmp_path, monkeypatch):
    """Two attempts and the pause, each attempt bounded for the connection alone."""
    from povid.server import bounded

    assert 2 * bounded.CONNECT + 1.0 < 10
    asked = endpoint("http://localhost:1/v1", tmp_path, timeout=600)
    assert asked._client.timeout.connect == bounded.CONNECT and asked._client.timeout.read == 600


def test_a_silent_server_is_told_before_its_first_reply_and_every_retry_is_shown(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.1)
    with ChatServer(lambda body, n: Silence() if n < 1 else Say("fine")) as server:
        replies = list(endpoint(server.url, tmp_path, timeout=0.25).ask_all([ask_for("1")]))
    assert [reply.text for _, reply in replies] == ["fine"]
    assert [line for line in said(caplog) if line == f"m at {server.url}: no reply for 0 s; requests under way: 1"]
    assert [
        line for line in said(caplog) if line.startswith("record 1: attempt 1 of 7 failed (no answer within 0.25 s)")
    ]


def test_a_server_that_goes_away_is_given_up_after_one_request_has_had_all_its_attempts(tmp_path):
    with ChatServer(lambda body, n: Say("fine")) as server:
        asked = endpoint(server.url, tmp_path, retries=3, concurrency=1)
        assert asked.ask(ask_for("0")).text == "fine"
    with pytest.raises(NoReply, match="in 4 attempts"):
        asked.ask(ask_for("1"))
    with pytest.raises(Unreachable):
        asked.ask(ask_for("2"))
    assert asked.ask(ask_for("0")).cached


def test_retired_names_are_refused_with_day_and_replacement(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none-of-your-business")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(retired, "today", lambda: date(2026, 12, 10))
    for model, day in (
        ("gpt-4-0613", "2026-10-23"),
        ("gpt-4-0314", "2026-03-26"),
        ("gpt-3.5-turbo-0613", "2024-09-13"),
    ):
        for address in (None, "https://api.openai.com/v1", "https://eu.api.openai.com/v1"):
            with pytest.raises(Fault, match=f"^OpenAI shut {model} down on {day}; use gpt-6.* with extra="):
                endpoint(address, tmp_path, model=model)
    endpoint("http://localhost:8000/v1", tmp_path, model="gpt-4-0613")  # whatever somebody else calls so
    assert not said(caplog)
    endpoint(None, tmp_path, model="gpt-5")  # its last day
    assert said(caplog)[0].startswith("OpenAI will shut gpt-5 down on 2026-12-11; then use gpt-6.1-terra")
    monkeypatch.setattr(retired, "today", lambda: date(2026, 12, 11))
    with pytest.raises(Fault, match="gpt-5"):
        endpoint(None, tmp_path, model="gpt-5")


def test_replies_of_a_retired_model_stay_usable(tmp_path, monkeypatch):
    """Scores can be computed again from the file, without a request."""
    with ChatServer(lambda body, n: Say("0.7")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        kept = endpoint(None, tmp_path, model="gpt-4-0613")
        kept.ask(ask_for("1"))
        monkeypatch.setattr(retired, "OPENAI", "127.0.0.1")
        asked = endpoint(None, tmp_path, model="gpt-4-0613")
        assert asked.ask(ask_for("1")).text == "0.7"
        with pytest.raises(Fault, match="record 2: OpenAI shut gpt-4-0613 down .*only its replies on disk"):
            asked.ask(ask_for("2"))
    assert len(server.requests) == 1


def test_the_list_of_retired_names_is_sound():
    names = [name for _, names in retired.RETIRED.values() for name in names.split()]
    assert len(names) == len(set(names))
    for day, (replacement, _) in retired.RETIRED.items():
        assert date.fromisoformat(day).isoformat() == day and replacement not in names


def test_useless_replies_are_asked_for_once_more_when_wanted(tmp_path):
    """The first server says nothing readable to 1 and nothing at all to 2; 3 is fine and stays."""

    def reads(reply):
        return int(reply.text) if reply.text.isdigit() else None

    requests = [ask_for("1", reads=reads), ask_for("2"), ask_for("3", reads=reads)]
    broken = {"1": "<think>", "2": "", "3": "30"}
    mended = False

    def script(body, number):
        text = body["messages"][0]["content"]
        return Say(text * 2 if mended and text != "2" else broken[text])

    def replies(**more) -> dict[int, str]:
        return {n: reply.text for n, reply in endpoint(server.url, tmp_path, **more).ask_all(requests)}

    with ChatServer(script) as server:
        assert replies() == replies() == {0: "<think>", 1: "", 2: "30"} and len(server.requests) == 3
        mended = True
        assert replies() == {0: "<think>", 1: "", 2: "30"}
        asked = endpoint(server.url, tmp_path, ask_again=True)
        for _ in range(2):  # once in a process: 2 is still empty and not asked for a third time
            assert {n: reply.text for n, reply in asked.ask_all(requests)} == {0: "11", 1: "", 2: "30"}
        assert len(server.requests) == 5
        assert replies() == {0: "11", 1: "", 2: "30"}  # from now on for everybody
        assert len(server.requests) == 5


def test_revision_and_further_arguments_belong_to_a_reply(tmp_path):
    with ChatServer(lambda body, n: Say(str(n))) as server:
        plain = endpoint(server.url, tmp_path)
        asked = [
            plain,
            endpoint(server.url, tmp_path, revision="c0ffee"),
            endpoint(server.url, tmp_path, revision="bad"),
        ]
        asked.append(endpoint(server.url, tmp_path, extra={"reasoning_effort": "none"}))
        for _ in range(2):
            assert [one.ask(ask_for("1")).text for one in asked] == ["0", "1", "2", "3"]
        extra = {"max_tokens": 4000, "temperature": None}  # of a model that reasons first
        endpoint(server.url, tmp_path, extra=extra).ask(ask_for("1", temperature=0.5))
    assert [body.get("reasoning_effort") for body in server.requests] == [None, None, None, "none", None]
    assert server.requests[-1]["max_tokens"] == 4000 and "temperature" not in server.requests[-1]
    assert plain.settings.identity() == {"model": "m"}
    assert asked[3].settings.identity() == {"model": "m", "extra": {"reasoning_effort": "none"}}


def test_a_refused_argument_is_told_in_the_servers_words(tmp_path):
    with (
        ChatServer(lambda body, n: Status(400, "Unsupported parameter: 'max_tokens'")) as server,
        pytest.raises(Fault, match="Unsupported parameter: 'max_tokens'"),
    ):
        endpoint(server.url, tmp_path).ask(ask_for("1"))
