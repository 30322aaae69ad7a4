"""A run against a server that misbehaves in every way: nothing lost, nothing asked twice, always the same set."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from generator_server import Misbehaving, write_rows
from hydra import compose, initialize_config_dir
from PIL import Image
from servers import ChatServer, Say, Silence, Status, last_text

from povid.dispreference.__main__ import run
from povid.dispreference.gates import Gates
from povid.dispreference.generate import Sampling, claimed, estimate, folder_of, generate, identity
from povid.dispreference.rows import read_rows
from povid.fault import Fault
from povid.machine import conf_folder
from povid.preferences.formats import povid
from povid.server.endpoint import Endpoint, EndpointSettings

ROOT = Path(__file__).resolve().parents[2]


def command(server: ChatServer, rows: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "povid.dispreference",
        f"input={rows}",
        f"images={rows.parent}",
        f"out={out}",
        "endpoint.model=m",
        f"endpoint.base_url={server.url}",
        "endpoint.timeout=2",
        "endpoint.backoff=0.01",
        *more,
    ]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def replies(out: Path) -> list[dict]:
    file = folder_of(out) / "replies.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1] if line]


def killed_at(server, rows: Path, out: Path, count: int) -> None:
    """Start a run and kill it as soon as ``count`` replies are on disk."""
    process = start(server, rows, out)
    try:
        for _ in range(3000):
            if len(replies(out)) >= count:
                break
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not out.exists()


def disturbed_equals_undisturbed(tmp_path: Path, count: int, kills: list[int]) -> None:
    rows = write_rows(tmp_path / "rows", count)
    calm, disturbed = tmp_path / "calm.json", tmp_path / "disturbed.json"
    with Misbehaving() as server:
        ended = start(server, rows, calm)
        printed, errors = ended.communicate(timeout=300)
        assert ended.returncode == 0, errors
        assert "rows take at most" in errors and "cost" in errors
    with Misbehaving(slow=0.02) as server:
        for number in kills:
            killed_at(server, rows, disturbed, number)
        ended = start(server, rows, disturbed)
        ended.communicate(timeout=300)
        assert ended.returncode == 0
        lost = len(server.said) - len(replies(disturbed))
    assert disturbed.read_bytes() == calm.read_bytes()
    assert (folder_of(disturbed) / "rejects.jsonl").read_bytes() == (folder_of(calm) / "rejects.jsonl").read_bytes()
    # asked twice are at most the eight that were in flight at each kill, and those that a time-out gave up
    assert lost <= 8 * len(kills) + 2
    assert max(Counter(reply["key"] for reply in replies(disturbed)).values()) == 1

    report = json.loads((folder_of(calm) / "report.json").read_text())
    triples = povid.read(calm, rows.parent)
    assert report["written"] == len(triples) and len(triples) + report["set_aside"] == count
    assert 0 < report["set_aside"] < count / 10
    for reason in (
        "refusal",
        "broken JSON",
        "wrong language",
        "empty",
        "identical",
        "changed everything",
        "leaked instruction",
    ):
        assert report["replies_refused"][reason] > 0
    assert report["hallucinations"]["reasoning"] > 0 and "motorcycle" in report["injected_objects"]
    assert f"{len(triples)} records written" in printed


def test_120_records_killed_twice_yield_the_same_set(tmp_path):
    disturbed_equals_undisturbed(tmp_path, 120, [30, 110])


@pytest.mark.slow
def test_500_records_killed_three_times_yield_the_same_set(tmp_path):
    disturbed_equals_undisturbed(tmp_path, 500, [100, 330, 600])


# --- one thing at a time, in this process ---


def endpoint(server: ChatServer, folder: Path, **more) -> Endpoint:
    folder.mkdir(exist_ok=True)
    settings = {"timeout": 5, "retries": 1, "backoff": 0.001, **more}
    return Endpoint(EndpointSettings(model="m", base_url=server.url, **settings), folder / "replies.jsonl")


def some_rows(tmp_path: Path, count: int = 6) -> list:
    file = write_rows(tmp_path / "rows", count)
    return read_rows(file, file.parent)


def say(text: str):
    return lambda body, number: Say(text, 100, 20)


def test_rows_that_never_get_a_usable_reply_are_set_aside_with_every_reason(tmp_path):
    rows = some_rows(tmp_path)
    with ChatServer(lambda body, n: Say("" if body["seed"] else "I'm sorry, I can't.")) as server:
        result = generate(rows, endpoint(server, tmp_path / "run"), Sampling(attempts=3), Gates(), quiet=True)
    assert result.triples == [] and result.figures["replies"] == 18
    assert result.rejects == [(row.id, ["refusal", "empty", "empty"]) for row in rows]
    assert result.reasons == {"refusal": 6, "empty": 12}


def test_refused_replies_of_a_mended_server_are_asked_for_again_by_the_flag_that_the_message_names(tmp_path, caplog):
    """Six rows refused; the mended server is asked about them once more, and about nothing when nothing is refused."""
    rows, mended = some_rows(tmp_path), []

    def script(body, number):
        wrong = re.search(r"^A: (.*)$", last_text(body), re.MULTILINE).group(1).replace("number", "square")
        return Say(f"Answer: {wrong}" if mended else "I'm sorry, I can't.")

    def made(**more) -> tuple[int, int]:
        asked = endpoint(server, tmp_path / "run", **more)
        result = generate(rows, asked, Sampling(attempts=1), Gates(), quiet=True)
        return len(result.triples), len(server.requests)

    with ChatServer(script) as server:
        assert made() == (0, 6) and "ask_again" not in caplog.text
        mended.append(True)
        assert made() == (0, 6) and "were on disk: 6; if the server has been mended since, endpoint.ask_again=true" in (
            caplog.text
        )
        assert made(ask_again=True) == (6, 12)
        assert made() == made(ask_again=True) == (6, 12)


def test_a_server_that_stays_silent_for_one_row_loses_nothing_else(tmp_path):
    rows = some_rows(tmp_path)

    def script(body, number):
        return Status(500) if "number 2 " in str(body) else Say("Answer: A blue bus and two cats are on the street.")

    with ChatServer(script) as server:
        with pytest.raises(Fault, match="1 of 6 rows got no reply .*record 'r2'.*start again.*give_up=true"):
            generate(rows, endpoint(server, tmp_path / "run"), Sampling(), Gates(), quiet=True)
        asked = len(server.requests)
        result = generate(rows, endpoint(server, tmp_path / "run"), Sampling(), Gates(), give_up=True, quiet=True)
    assert ("r2", ["no reply"]) in result.rejects and result.reasons["no reply"] == 1
    assert len(server.requests) == asked + 2  # only the silent row, two tries


def test_the_budget_ends_the_run_before_it_is_exceeded_and_a_larger_one_resumes(tmp_path):
    rows = some_rows(tmp_path)
    good = say("Answer: A blue bus and three dogs are on street number 1 in the morning.")
    with ChatServer(good) as server:
        with pytest.raises(Fault, match="stopped before the budget"):
            generate(
                rows,
                endpoint(server, tmp_path / "run", token_budget=2600, concurrency=1),
                Sampling(),
                Gates(),
                quiet=True,
            )
        first = len(server.requests)
        assert 0 < first < 6
        generate(rows, endpoint(server, tmp_path / "run"), Sampling(attempts=1), Gates(), quiet=True)
    assert len(server.requests) == 6


def test_the_estimate_comes_before_anything_is_sent_and_is_not_exceeded(tmp_path):
    rows = some_rows(tmp_path)
    with ChatServer(say("Answer: A blue bus and three dogs are on street number 1 in the morning.")) as server:
        model = endpoint(server, tmp_path / "run", input_price=10.0, output_price=30.0)
        sentence = estimate(rows, model, Sampling(attempts=1))
        assert not server.requests and sentence.startswith("6 rows take at most ")
        result = generate(rows, model, Sampling(attempts=1), Gates(), quiet=True)
    # 6 replies of 100 and 20 tokens: 6 * (100 * 10 + 20 * 30) / 1e6
    assert result.figures["cost"] == pytest.approx(0.0096)
    assert float(sentence.split(" and ")[1].split(" ")[0]) > result.figures["cost"]


def test_pictures_are_sent_small_and_broken_ones_set_aside(tmp_path, caplog):
    rows = some_rows(tmp_path, 5)
    (tmp_path / "rows" / "1.png").write_bytes(b"no picture")
    with ChatServer(say("Answer: A blue bus and three dogs are on street number 1 in the morning.")) as server:
        result = generate(
            rows, endpoint(server, tmp_path / "run"), Sampling(attempts=1, max_side=100), Gates(), quiet=True
        )
        urls = [
            part["image_url"]["url"]
            for body in server.requests
            for part in body["messages"][0]["content"]
            if part["type"] == "image_url"
        ]
    assert ("r1", ["broken picture"]) in result.rejects and "1.png" in caplog.text
    assert len(urls) == 4
    for url in urls:
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert max(picture.size) <= 100 and picture.mode == "RGB"


def test_two_processes_cannot_write_to_one_place(tmp_path):
    out = tmp_path / "out.json"
    with claimed(out, {"a": 1}), pytest.raises(Fault, match="another process is writing"), claimed(out, {"a": 1}):
        pass
    with claimed(out, {"a": 1}):
        pass


def test_an_existing_file_is_kept_unless_it_is_this_runs_own(tmp_path):
    out = tmp_path / "out.json"
    with claimed(out, {"a": 1}):
        out.write_text("[]")
    with claimed(out, {"a": 1}):
        pass
    with pytest.raises(Fault, match="exists and comes from other rows or settings"), claimed(out, {"a": 2}):
        pass
    other = tmp_path / "other.json"
    other.write_text("mine")
    with pytest.raises(Fault, match="exists"), claimed(other, {"a": 1}):
        pass
    assert other.read_text() == "mine"


def test_the_identity_of_a_run_is_its_rows_and_settings(tmp_path):
    rows = some_rows(tmp_path)
    assert identity(rows, model="m") == identity(list(rows), model="m")
    assert identity(rows, model="m") != identity(rows, model="n") and identity(rows) != identity(rows[:-1])


def test_two_commands_at_once_end_in_one_sentence_each(tmp_path):
    """The second one is refused at once, the first is not disturbed."""
    rows = write_rows(tmp_path / "rows", 3)
    out = tmp_path / "out.json"
    with ChatServer(lambda body, n: Silence()) as server:
        first = start(server, rows, out, "endpoint.timeout=60")
        try:
            for _ in range(1500):
                if server.requests:
                    break
                time.sleep(0.02)
            second = start(server, rows, out)
            assert second.communicate(timeout=60)[1].strip() == (
                f"error: another process is writing {out}; wait until it ends or choose another out"
            )
            assert second.returncode == 2 and first.poll() is None
        finally:
            first.kill()
            first.communicate()


MISTAKES = [
    ("input=absent.jsonl", "absent.jsonl does not exist"),
    ("out=a.txt", "must end in .json"),
    ("limit=-1", "limit=-1 selects no record"),
    ("sampling.attempts=many", "sampling.attempts: found 'many'"),
    ("gates.short=-1", "gates.short: found -1"),
    ("gates.least_overlap=1", "gates: least_overlap must be smaller than most_overlap"),
    ("prompt=captions", "prompt=captions does not exist"),
    ("images=absent", "image folder absent does not exist"),
    ("endpoint.model=null", "no model is named"),
]


def test_mistakes_are_one_sentence(tmp_path):
    rows = write_rows(tmp_path / "rows", 2)
    for change, sentence in [*MISTAKES, ("dispreference=cooccurrence", "objects is not set")]:
        given = [f"input={rows}", f"images={rows.parent}", f"out={tmp_path}/o.json", "endpoint.model=m", change]
        if change.startswith("dispreference"):
            given.remove("endpoint.model=m")
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("dispreference", given)
        with pytest.raises(Fault, match=re.escape(sentence)):
            run(config)


def test_every_invalid_setting_is_reported_at_once(tmp_path):
    rows = write_rows(tmp_path / "rows", 2)
    changes = [
        f"input={rows}",
        f"images={rows.parent}",
        "endpoint.model=m",
        "sampling.attempts=0",
        "endpoint.timeout=-1",
        "give_up=maybe",
    ]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose(
            "dispreference", [f"input={rows}", f"images={rows.parent}", f"out={tmp_path}/o.json", *changes]
        )
    with pytest.raises(Fault) as caught:
        run(config)
    for key in ("sampling.attempts: found 0", "endpoint.timeout: found -1", "give_up: found 'maybe'"):
        assert key in str(caught.value)
