"""Endpoint against a server on this machine that misbehaves in every way a real one does."""

from __future__ import annotations

import base64
import gzip
import io
import json
import multiprocessing
import resource
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from PIL import Image
from servers import ChatServer, Cut, Drip, Raw, Say, Silence, Status, last_text

from povid.fault import Fault, validated
from povid.preferences.pictures import open_picture
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Request, image_part
from povid.server.replies import BudgetReached


def ask_for(text: str, **more) -> Request:
    return Request([{"role": "user", "content": text}], max_tokens=5, name=f"record {text}", **more)


def endpoint(server: ChatServer, folder, **more) -> Endpoint:
    settings = {"timeout": 5, "retries": 4, "backoff": 0.001, **more}
    return Endpoint(EndpointSettings(model="m", base_url=server.url, **settings), folder / "replies.jsonl")


@pytest.mark.parametrize(
    "bad",
    [
        Status(429),
        Status(500),
        Status(503),
        Status(408),
        Cut(),
        Silence(),
        Raw(b"<html>busy</html>", "text/html"),
        Raw(b'{"id": "c", "choi'),
        Raw(b'{"choices": []}'),
        Raw(b'{"choices": null}'),
        Raw(b"null"),
        Raw(b""),
        Raw(b"[1]"),
        Raw(b"[" * 100_000),
        Raw(b'{"choices": [' * 900 + b"1" + b"]}" * 900),
        Raw(b'{"choices": "abc"}'),
        Raw(b'{"choices": [{"message": "abc"}]}'),
        Raw(b'{"choices": [{"message": {"content": ["abc"]}}]}'),
        Raw(b'{"choices": [{"finish_reason": {"a": 1}, "message": {"content": "abc"}}]}'),
        *(
            Raw(json.dumps({"choices": [{"message": {"content": "abc"}}], "usage": usage}).encode())
            for usage in (
                {"prompt_tokens": -5, "completion_tokens": 1},
                {"prompt_tokens": 1, "completion_tokens": 10**30},
                {"prompt_tokens": 1.5, "completion_tokens": 1},
                {"prompt_tokens": True, "completion_tokens": 1},
                {"prompt_tokens": "many", "completion_tokens": 1},
                {"prompt_tokens": 1, "completion_tokens": [1]},
                "many",
                [1],
            )
        ),
        Drip(headers=True),
        Drip(headers=False),
    ],
    ids=lambda bad: repr(bad)[:60],
)
def test_a_bad_reply_is_asked_again(tmp_path, bad):
    with ChatServer(lambda body, n: bad if n < 2 else Say("fine")) as server:
        reply = endpoint(server, tmp_path, timeout=0.2).ask(ask_for("1"))
    assert (reply.text, len(server.requests)) == ("fine", 3)


@pytest.mark.parametrize(
    "bad, says",
    [
        (Status(503, "over capacity"), "over capacity"),
        (Silence(), "no answer within"),
        (Cut(), "connection"),
        (Raw(b"prose"), "not a chat completion"),
    ],
    ids=repr,
)
def test_after_the_last_try_the_request_is_named(tmp_path, bad, says):
    with (
        ChatServer(lambda body, n: bad) as server,
        pytest.raises(NoReply, match=f"^record 17: m at .* in 3 attempts .*{says}.*run again"),
    ):
        endpoint(server, tmp_path, retries=2, timeout=0.1).ask(ask_for("17"))
    assert len(server.requests) == 3


def test_a_refused_request_is_not_repeated_and_carries_the_servers_sentence(tmp_path):
    with (
        ChatServer(lambda body, n: Status(401, "Incorrect API key provided")) as server,
        pytest.raises(Fault, match="record 1: .*401.*Incorrect API key provided"),
    ):
        endpoint(server, tmp_path).ask(ask_for("1"))
    assert len(server.requests) == 1


def test_an_exhausted_quota_is_not_retried(tmp_path):
    with (
        ChatServer(lambda body, n: Status(429, "quota", error_code="insufficient_quota")) as server,
        pytest.raises(Fault, match="quota"),
    ):
        endpoint(server, tmp_path).ask(ask_for("1"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("header", ["0.3", lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=2))])
def test_retry_after_holds_every_thread_back(tmp_path, header):
    """A date has whole seconds, so two seconds ahead is at least one."""
    least = 0.3 if isinstance(header, str) else 0.9
    first, times = [], []

    def script(body, n):
        times.append(time.monotonic())
        if not first:
            first.append(n)
            return Status(429, headers={"Retry-After": header if isinstance(header, str) else header()})
        return Say("fine")

    with ChatServer(script) as server:
        model = endpoint(server, tmp_path)
        model.ask(ask_for("1"))
        model.ask(ask_for("2"))
    assert times[1] - times[0] >= least and len(times) == 3


def test_replies_survive_and_nothing_is_asked_twice(tmp_path):
    with ChatServer(lambda body, n: Say(last_text(body) * 2, 7, 3)) as server:
        first = endpoint(server, tmp_path, input_price=1.0, output_price=2.0)
        assert first.ask(ask_for("a")).cached is False
        again = endpoint(server, tmp_path, input_price=1.0, output_price=2.0).ask(ask_for("a"))
        assert (again.text, again.cached, again.tokens) == ("aa", True, 10)
        assert again.cost == pytest.approx((7 * 1 + 3 * 2) / 1e6)
        first.ask(ask_for("a", sample=1))
        first.ask(ask_for("a", temperature=0.5))
        first.ask(ask_for("a", extra={"top_p": 0.5}))
    assert len(server.requests) == 4
    assert (first.paid.requests, first.paid.tokens) == (4, 40)
    assert not list((tmp_path / "replies.jsonl.claims").iterdir())


def test_a_torn_line_costs_one_reply_and_a_foreign_file_is_refused(tmp_path):
    with ChatServer(lambda body, n: Say("fine")) as server:
        model = endpoint(server, tmp_path)
        model.ask(ask_for("1"))
        model.ask(ask_for("2"))
        file = tmp_path / "replies.jsonl"
        file.write_bytes(file.read_bytes()[:-20])  # killed while writing the second
        resumed = endpoint(server, tmp_path)
        assert resumed.ask(ask_for("1")).cached and not resumed.ask(ask_for("3")).cached
        assert not resumed.ask(ask_for("2")).cached
        assert endpoint(server, tmp_path).ask(ask_for("3")).cached
    assert len(server.requests) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "replies.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(Fault, match="replies.jsonl: a line is not a reply"):
        Endpoint(EndpointSettings(model="m", base_url="http://127.0.0.1:1/v1"), tmp_path / "other" / "replies.jsonl")


def test_a_reply_that_was_edited_is_not_used(tmp_path, caplog):
    file = tmp_path / "replies.jsonl"
    with ChatServer(lambda body, n: Say("score: 3", 7, 3)) as server:
        for text in ("1", "2"):
            endpoint(server, tmp_path).ask(ask_for(text))
        first, second = file.read_text().splitlines()
        assert "score: 3" in first and '"completion_tokens": 3' in first
        old = json.loads(second)
        del old["check"]  # a line of an earlier version
        for edited in (
            first.replace("score: 3", "score: 6"),
            first.replace('"completion_tokens": 3', '"completion_tokens": 4'),
        ):
            file.write_text(f"{edited}\n{json.dumps(old)}\n")
            caplog.clear()
            asked = len(server.requests)
            again = endpoint(server, tmp_path)
            assert "the reply to record 1 was changed after it was written" in caplog.text
            assert again.ask(ask_for("2")).cached and len(server.requests) == asked
            assert again.ask(ask_for("1")).text == "score: 3" and len(server.requests) == asked + 1
            assert endpoint(server, tmp_path).ask(ask_for("1")).cached, "the new reply counts, not the edited one"


def test_a_full_disk_is_one_sentence_and_costs_one_reply(tmp_path):
    """The limit on a file's size stands for the full disk: half of the second reply's line still fits."""
    file, limits = tmp_path / "replies.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with ChatServer(lambda body, n: Say("fine")) as server:
        model = endpoint(server, tmp_path)
        model.ask(ask_for("1"))
        size = file.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))
            with pytest.raises(Fault, match="replies.jsonl: the reply to record 2 could not be written .*make room"):
                model.ask(ask_for("2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not model.ask(ask_for("2")).cached and model.ask(ask_for("1")).cached
        assert endpoint(server, tmp_path).ask(ask_for("2")).cached
    assert len(server.requests) == 3


def test_many_at_once_are_bounded_lazy_and_one_failure_is_one_failure(tmp_path):
    drawn, most_ahead = [], []

    def requests():
        for n in range(30):
            drawn.append(n)
            yield ask_for(str(n))

    def script(body, n):
        time.sleep(0.005)
        return Status(500) if last_text(body) == "7" else Say("re " + last_text(body))

    replies = {}
    with ChatServer(script) as server:
        for position, reply in endpoint(server, tmp_path, concurrency=3, retries=1).ask_all(requests()):
            replies[position] = reply
            most_ahead.append(len(drawn) - len(replies))
    assert sorted(replies) == list(range(30)) and isinstance(replies.pop(7), NoReply)
    assert all(reply.text == f"re {n}" for n, reply in replies.items())
    assert server.most_in_flight <= 3 and max(most_ahead) <= 3


def test_a_fault_in_the_middle_still_hands_over_what_was_in_flight(tmp_path):
    gate = threading.Event()

    def script(body, n):
        if last_text(body) == "bad":
            return Status(400, "too long")
        gate.wait(0.1)
        return Say("fine")

    got = []
    with ChatServer(script) as server, pytest.raises(Fault, match="record bad: .*too long"):
        for position, _ in endpoint(server, tmp_path, concurrency=2).ask_all(map(ask_for, ["a", "bad", "b"])):
            got.append(position)
    assert got == [0]


def test_the_budget_stops_before_it_is_exceeded_and_counts_earlier_runs(tmp_path):
    """Each request: 60 characters make 20 + 16 = 36 tokens, at most 5 back: 41 reserved; 30 + 2 = 32 taken.
    Budget 110: 32 spent + 41 = 73 fits, 64 + 41 = 105 fits, 96 + 41 = 137 does not: three are sent."""
    with ChatServer(lambda body, n: Say("fine", 30, 2)) as server:
        model = endpoint(server, tmp_path, token_budget=110, concurrency=4)
        got = []
        with pytest.raises(BudgetReached, match="budget of 110 tokens.*96 tokens spent.*raise the budget"):
            for _, reply in model.ask_all(ask_for(f"{n:060d}") for n in range(9)):
                got.append(reply.tokens)
        assert got == [32, 32, 32] and len(server.requests) == 3
        with pytest.raises(BudgetReached):
            endpoint(server, tmp_path, token_budget=110).ask(ask_for("9" * 60))
        assert endpoint(server, tmp_path, token_budget=110).ask(ask_for(f"{0:060d}")).cached
        money = endpoint(server, tmp_path, budget=1e-5, input_price=1, output_price=1)
        with pytest.raises(BudgetReached):
            money.ask(ask_for("9" * 60))
    assert len(server.requests) == 3


def test_invalid_settings_are_reported_together():
    with pytest.raises(Fault) as caught:
        validated(
            EndpointSettings,
            {"concurrency": 0, "timeout": "long", "retries": True, "backof": 1.0, "requests_per_minute": 0},
            "judge",
        )
    for part in (
        "judge.concurrency: found 0, needed at least 1",
        "judge.timeout: found 'long'",
        "judge.retries: found True",
        "judge.requests_per_minute: found 0",
        "judge.backof: there is no such setting; did you mean 'backoff'?",
    ):
        assert part in str(caught.value)
    with pytest.raises(Fault, match="^judge: budget=1 needs input_price and output_price"):
        validated(EndpointSettings, {"budget": 1.0, "input_price": 2}, "judge")
    with pytest.raises(Fault, match="no model is named"):
        Endpoint(EndpointSettings(base_url="http://127.0.0.1:1/v1"), "replies.jsonl")


def test_requests_per_minute(tmp_path):
    times = []
    with ChatServer(lambda body, n: times.append(time.monotonic()) or Say("fine")) as server:
        list(endpoint(server, tmp_path, requests_per_minute=1200).ask_all(ask_for(str(n)) for n in range(5)))
    assert times[-1] - times[0] >= 0.19


def _ask_from_a_process(url, folder, names, budget=10_000):
    settings = EndpointSettings(model="m", base_url=url, concurrency=4, token_budget=budget)
    model = Endpoint(settings, folder / "replies.jsonl")
    try:
        list(model.ask_all(ask_for(name) for name in names))
    except BudgetReached:
        raise SystemExit(3) from None


def test_two_processes_share_a_file_and_pay_once(tmp_path):
    def script(body, n):
        time.sleep(0.002)
        return Say("re " + last_text(body))

    names = [str(n) for n in range(40)]
    with ChatServer(script) as server:
        fork = multiprocessing.get_context("spawn")
        workers = [
            fork.Process(target=_ask_from_a_process, args=(server.url, tmp_path, order))
            for order in (names, names[::-1], names[20:] + names[:20])
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert sorted(map(last_text, server.requests)) == sorted(names)
        kept = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
        assert sorted(record["text"] for record in kept) == sorted("re " + name for name in names)


def test_two_processes_share_a_budget(tmp_path):
    """A request reserves 1 + 16 + 5 = 22 tokens and takes 20. Of 205, 180 + 22 = 202 fit and 200 + 22 do not: ten are
    sent, whichever process sends them."""
    with ChatServer(lambda body, n: time.sleep(0.005) or Say("fine", 15, 5)) as server:
        fork = multiprocessing.get_context("spawn")
        workers = [
            fork.Process(target=_ask_from_a_process, args=(server.url, tmp_path, list(map(str, numbers)), 205))
            for numbers in (range(100, 120), range(200, 220))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    assert [worker.exitcode for worker in workers] == [3, 3] and len(server.requests) == 10


def test_a_kill_leaves_nothing_stuck_and_only_what_was_in_flight_is_asked_again(tmp_path):
    names = [str(n) for n in range(12)]
    gate = threading.Event()

    def script(body, n):
        if int(last_text(body)) >= 8:
            gate.wait(20)
        return Say("fine")

    with ChatServer(script) as server:
        worker = multiprocessing.get_context("spawn").Process(
            target=_ask_from_a_process, args=(server.url, tmp_path, names)
        )
        worker.start()
        while len(server.requests) < 12:
            time.sleep(0.01)
        worker.kill()
        worker.join()
        gate.set()
        kept = len((tmp_path / "replies.jsonl").read_bytes().splitlines())
        assert 1 <= kept <= 8 and len(list((tmp_path / "replies.jsonl.claims").iterdir())) == 4
        _ask_from_a_process(server.url, tmp_path, names)
        assert len(server.requests) == 12 + 12 - kept
        assert not list((tmp_path / "replies.jsonl.claims").iterdir())


def test_half_characters_are_sent_and_kept(tmp_path):
    with ChatServer(lambda body, n: Say("re\ud83d" + last_text(body))) as server:
        assert endpoint(server, tmp_path).ask(ask_for("a\ud800")).text == "re\ud83da?"
        assert endpoint(server, tmp_path).ask(ask_for("a\ud800")).text == "re\ud83da?"
    assert len(server.requests) == 1


def test_a_reply_has_a_greatest_size(tmp_path, monkeypatch):
    huge = b'{"choices": [{"message": {"content": "' + b"a" * 200_000 + b'"}}]}'
    with ChatServer(lambda body, n: Raw(huge) if n < 1 else Say("fine")) as server:
        model = endpoint(server, tmp_path)
        model._client._client.most_bytes = 100_000
        assert model.ask(ask_for("1")).text == "fine"
        assert len(model.ask(ask_for("2")).text) == 4
    packed = gzip.compress(huge * 50)
    zipped = Raw(packed, "application/json", "gzip")
    with ChatServer(lambda body, n: zipped) as server:
        model = endpoint(server, tmp_path, retries=0)
        model._client._client.most_bytes = 2 * len(packed)
        with pytest.raises(NoReply, match="the reply is longer than"):
            model.ask(ask_for("3"))


def test_secrets_stay_where_they_are(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    secret = "sk-verysecret123"
    monkeypatch.setenv("OPENAI_API_KEY", secret)

    def echo(body, number):
        return (Status(500, f"bad key {secret}"), Say(f"You sent {secret}."), Status(401, f"No: {secret}"))[number]

    with ChatServer(echo) as server:
        model = endpoint(server, tmp_path)
        assert model.ask(ask_for("1")).text == "You sent [key]."
        with pytest.raises(Fault, match=r"status 401: .*No: \[key\]"):
            model.ask(ask_for("2"))
    assert server.headers[0]["authorization"] == f"Bearer {secret}"
    assert "bad key [key]" in caplog.text and secret not in caplog.text
    assert secret not in (tmp_path / "replies.jsonl").read_text()

    for settings, sentence in (
        ({"base_url": "http://me:hunter2@host/v1"}, "base_url: the address holds a user name or password"),
        ({"base_url": "host:8000/v1"}, "base_url: needed an address that begins with http"),
        ({"base_url": "http://[hunter2/v1"}, "base_url: needed an address that begins with http"),
        ({"api_key_env": "sk-hunter2"}, "api_key_env: needed the name of an environment variable, not the key itself"),
    ):
        with pytest.raises(Fault, match=f"judge.{sentence}") as caught:
            validated(EndpointSettings, settings, "judge")
        assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hunter2@host/v1")
    with pytest.raises(Fault, match="OPENAI_BASE_URL: the address holds a user name") as caught:
        Endpoint(EndpointSettings(model="m"), tmp_path / "r.jsonl")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2\nx")
    with pytest.raises(Fault, match="OPENAI_API_KEY holds characters that no key has"):
        Endpoint(EndpointSettings(model="m", base_url="http://127.0.0.1:1/v1"), tmp_path / "r.jsonl")


def test_replies_on_disk_are_of_the_right_kind(tmp_path):
    file = tmp_path / "replies.jsonl"
    sound = {"key": "k", "text": "a", "prompt_tokens": 1, "completion_tokens": 1, "cost": 0.0, "finish_reason": ""}
    settings = EndpointSettings(model="m", base_url="http://127.0.0.1:1/v1")
    for change in ({"text": 3}, {"prompt_tokens": "1"}, {"cost": -1}, {"cost": float("inf")}, {"finish_reason": None}):
        file.write_text(json.dumps(sound | change) + "\n")
        with pytest.raises(Fault, match="replies.jsonl: a line is not a reply"):
            Endpoint(settings, file)
    file.write_text("[" * 100_000 + "\n" + json.dumps(sound) + "\n")
    assert Endpoint(settings, file).total.requests == 1


def test_a_key_is_needed_only_without_a_server_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(Fault, match="OPENAI_API_KEY is not set"):
        Endpoint(EndpointSettings(model="m"), tmp_path / "r.jsonl")
    with ChatServer(lambda body, n: Say("fine")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("MY_KEY", "k1")
        Endpoint(EndpointSettings(model="m", api_key_env="MY_KEY"), tmp_path / "r.jsonl").ask(ask_for("1"))
    assert server.headers[0]["authorization"] == "Bearer k1"
    assert "k1" not in (tmp_path / "r.jsonl").read_text()


def test_no_usage_is_estimated_and_nothing_said_is_an_empty_text(tmp_path):
    """Three characters: 1 + 16 tokens asked; "four" is 4 bytes: 1 token back."""
    with ChatServer(lambda body, n: Say(None if n else "four", usage=False)) as server:
        model = endpoint(server, tmp_path)
        reply = model.ask(ask_for("abc"))
        assert (reply.prompt_tokens, reply.completion_tokens) == (17, 1)
        assert model.ask(ask_for("x")).text == ""


# ---------------------------------------------------------------------- pictures


def encoded(size, kind, mode="RGB", colour=(255, 0, 0), **more) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **more)
    return buffer.getvalue()


def decoded(part) -> tuple[str, Image.Image, bytes]:
    head, data = part["image_url"]["url"].split(";base64,")
    raw = base64.b64decode(data)
    return head, Image.open(io.BytesIO(raw)), raw


def test_a_jpeg_that_fits_goes_as_it_is():
    data = encoded((30, 20), "JPEG")
    head, _, raw = decoded(image_part(data, 30))
    assert (head, raw) == ("data:image/jpeg", data)


def test_a_large_picture_is_made_smaller_and_stays_a_photograph(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded((400, 100), "PNG"))
    head, image, _ = decoded(image_part(tmp_path / "a.png", 100))
    assert (head, image.size) == ("data:image/jpeg", (100, 25))


def test_transparent_parts_become_white_and_small_pictures_lose_nothing():
    head, image, _ = decoded(image_part(encoded((4, 4), "PNG", "RGBA", (9, 9, 9, 0))))
    assert (head, image.mode, image.getpixel((0, 0))) == ("data:image/png", "RGB", (255, 255, 255))


def test_a_rotated_photograph_is_sent_as_local_models_see_it():
    """The pixels as they are stored, and no EXIF data by which a server would rotate them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded((30, 20), "JPEG", exif=exif)
    for side in (100, 30, 15):
        _, image, _ = decoded(image_part(data, side))
        assert image.size == (min(30, side), min(20, side * 2 // 3)) and not image.getexif()
    assert open_picture(data).size == (30, 20)


def test_sixteen_bits_of_grey_are_scaled_everywhere():
    """A ramp from 0 to 65,535: shades 0 to 255, where Pillow's conversion makes all above 255 white."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    buffer = io.BytesIO()
    ramp.save(buffer, "PNG")
    wanted = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for picture in (open_picture(buffer.getvalue()), decoded(image_part(buffer.getvalue()))[1]):
        np.testing.assert_array_equal(np.asarray(picture), wanted)


def test_broken_absent_and_enormous_pictures_are_named(tmp_path, monkeypatch):
    file = tmp_path / "cat.jpg"
    with pytest.raises(Fault, match="cat.jpg: the image cannot be read"):
        image_part(file)
    whole = encoded((64, 64), "JPEG")
    for damaged in (whole[: len(whole) // 2], b"", b"<html>"):
        file.write_bytes(damaged)
        with pytest.raises(Fault, match="cat.jpg: this is not a readable image"):
            image_part(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file.write_bytes(whole)
    with pytest.raises(Fault, match="cat.jpg: the image is too large"):
        image_part(file)


def test_two_servers_that_know_a_model_by_one_name_are_not_taken_for_each_other(tmp_path):
    with (
        ChatServer(lambda body, number: Say("of the first")) as one,
        ChatServer(lambda body, number: Say("of the second")) as two,
    ):
        assert endpoint(one, tmp_path).ask(ask_for("a")).text == "of the first"
        assert endpoint(two, tmp_path).ask(ask_for("a")).text == "of the second"
        again = endpoint(one, tmp_path).ask(ask_for("a"))
    assert again.text == "of the first" and again.cached
