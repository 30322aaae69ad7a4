"""A served model as an answerer."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from servers import ChatServer, Say, Silence, last_text

from povid.benchmarks import suite
from povid.benchmarks.mme import MME
from povid.fault import Fault
from povid.model.question import Decoding, Question
from povid.model.served import ServedModel
from povid.server.endpoint import NoReply


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def answerer(server, folder, **more):
    model = ServedModel(
        name="mine",
        model="m",
        base_url=server.url,
        cache=str(folder / "replies.jsonl"),
        timeout=0.2,
        retries=1,
        backoff=0.001,
        **more,
    )
    return model.answerer(batch_size=4, seed=1)


def test_all_pictures_of_a_question_are_sent_in_front_of_its_text(tmp_path):
    with ChatServer(lambda body, n: Say("yes")) as server:
        list(answerer(server, tmp_path)([Question("two", (picture(), picture()), "Q?")], Decoding(4)))
        (request,) = server.requests
    assert [part["type"] for part in request["messages"][-1]["content"]] == ["image_url", "image_url", "text"]


def test_answers_with_picture_text_and_decoding(tmp_path):
    questions = [Question(n, picture(), f"Q{n}?", {}) for n in range(5)] + [Question("text", None, "Alone?", {})]
    with ChatServer(lambda body, n: Say(f" {last_text(body)} yes\n")) as server:
        answer = answerer(server, tmp_path, system="Be brief.")
        answers = dict(answer(questions, Decoding(max_new_tokens=7, temperature=0.2)))
    assert answers == {**{n: f"Q{n}? yes" for n in range(5)}, 5: "Alone? yes"}
    body = server.requests[0]
    assert (body["max_tokens"], body["temperature"], body["messages"][0]["content"]) == (7, 0.2, "Be brief.")
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]


def test_a_question_that_times_out_is_named_last_and_asked_alone_next_time(tmp_path):
    questions = [Question(f"q{n}", None, f"Q{n}?", {}) for n in range(4)]
    stuck = [True]
    got = {}
    with ChatServer(lambda body, n: Silence() if last_text(body) == "Q1?" and stuck else Say("yes")) as server:
        answer = answerer(server, tmp_path)
        with pytest.raises(NoReply, match="1 of 4 questions got no answer, the first: question q1: .*no answer within"):
            got.update(answer(questions, Decoding(5)))
        assert sorted(got) == [0, 2, 3]
        stuck.clear()
        before = len(server.requests)
        assert dict(answer(questions, Decoding(5))) == dict.fromkeys(range(4), "yes")
        assert len(server.requests) == before + 1


def test_a_benchmark_whose_served_model_times_out_is_missing_with_its_reason_and_resumes(tmp_path):
    """Four questions of MME; the third times out in the first run and is the only one asked in the second. All answers
    are yes, two of four right, no image twice: 50 + 0."""
    folder = tmp_path / "data" / "MME_Benchmark_release_version" / "count"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture())
        (folder / f"{name}.txt").write_text(f"Is {name} one? Please answer yes or no.\tYes\nIs {name} two?\tNo\n")
    selection, stuck = {"mme": MME(data=tmp_path / "data")}, [True]
    with ChatServer(lambda body, n: Silence() if "Is b one?" in last_text(body) and stuck else Say("Yes")) as server:

        def run(out):
            return suite.run(selection, answerer(server, out), out, model="served-m")["mme"]

        first = run(tmp_path)
        assert "1 of 4 questions got no answer, the first: question count/b/0" in first["missing"]
        assert len((tmp_path / "mme" / "answers.jsonl").read_text().splitlines()) == 3
        stuck.clear()
        (tmp_path / "replies.jsonl").unlink()  # the answers themselves are enough to go on
        before = len(server.requests)
        assert run(tmp_path)["subtasks"]["count"]["score"] == 50.0
        assert len(server.requests) == before + 1


def test_a_broken_picture_names_the_question(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with ChatServer(lambda body, n: Say("yes")) as server:
        answer = answerer(server, tmp_path)
        with pytest.raises(Fault, match="question 3: .*a.png: this is not a readable image"):
            list(answer([Question(3, tmp_path / "a.png", "Q?", {})], Decoding(5)))


def test_a_served_model_takes_no_adapter_and_dumps_to_json(tmp_path):
    model = ServedModel(name="mine", model="m", base_url="http://127.0.0.1:1/v1", cache=tmp_path / "r.jsonl")
    with pytest.raises(Fault, match="cannot load the adapter stage_1; merge"):
        model.answerer(["stage_1"])
    assert not model.trainable
    assert ServedModel(**json.loads(json.dumps(model.model_dump(mode="json")))) == model
