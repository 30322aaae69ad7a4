"""The judge's official prompt: found in scripts of the official form, used word for word, and never mixed with ours.

The scripts here are made up; the true ones are found in the same way, at the pinned sums.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from internet import LLAVA, MM_VET, MMHAL, SCRIPTS
from PIL import Image
from servers import ChatServer, Files, Say, file_server, last_text

from povid.benchmarks import __main__ as command
from povid.benchmarks import wording
from povid.benchmarks.benchmark import Source
from povid.benchmarks.judge import Judge
from povid.benchmarks.llava_bench import LLaVABench
from povid.benchmarks.mm_vet import MMVet
from povid.benchmarks.mmbench import MMBench
from povid.benchmarks.mmhal import MMHal
from povid.fault import Fault
from povid.server.endpoint import Request


def pin(monkeypatch, kind, address: str = "http://x", scripts: dict[str, str] | None = None) -> None:
    scripts = scripts or SCRIPTS[kind]
    monkeypatch.setattr(
        kind,
        "prompt_sources",
        tuple(
            Source(f"{address}/{name}", f"judge/{name}", sha256=hashlib.sha256(text.encode()).hexdigest())
            for name, text in scripts.items()
        ),
    )


def put(kind, folder: Path, scripts: dict[str, str] | None = None) -> None:
    (folder / "judge").mkdir(parents=True, exist_ok=True)
    for name, text in (scripts or SCRIPTS[kind]).items():
        (folder / "judge" / name).write_text(text)


def official(monkeypatch, kind, folder: Path) -> None:
    pin(monkeypatch, kind)
    put(kind, folder)
    wording.store(kind, folder)


def test_every_official_prompt_is_found_word_for_word():
    for kind, parts in {
        MMHal: {"prompt": "Judge this, please.\n{}\n/ {} / {} / {}\nRating:"},
        MMVet: {"prompt": "Grade it.\na | b | c | d\n", "insist": "\nSay a digit: "},
        LLaVABench: {
            "system": "You check {answers}.",
            "frame": "<Context>\n{context}\n<Question>{question}\n{{x}}<Helper 1>{reference}<Helper 2>{answer}\n"
            "{rule}!",
            "conv": "Rate conv.",
            "detail": "Rate detail.",
            "complex": "Rate complex.",
        },
        MMBench: {"prompt": "Match. Q: {}? O: {} A: {} Out:", "options": "Several: \n"},
    }.items():
        assert kind.official_prompt(SCRIPTS[kind]) == parts
        assert set(kind.own_prompt()) == set(parts)


def test_fetch_reads_it_and_the_judge_is_asked_in_it(tmp_path, monkeypatch, capsys):
    """In one command; the words and the settings of the official script, our own where they were not fetched."""
    monkeypatch.setattr(MMVet, "sources", ())
    monkeypatch.setattr(MMVet, "graded", ())
    rows = {"v1_0": {"imagename": "a.png", "question": "Q?", "answer": "1<AND>2", "capability": ["rec"]}}
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    benchmark = MMVet(data=tmp_path)
    questions = benchmark.questions()
    with ChatServer(lambda body, n: Say("good" if n % 2 == 0 else "0.5")) as server:

        def scored(**more) -> dict:
            judge = Judge(cache=tmp_path / "r.jsonl", base_url=server.url, model="m", **more)
            return benchmark.score(questions, ["p"], judge).scores["judge"]

        own = scored()
        with file_server(Files({"/mm-vet_evaluator.py": MM_VET.encode()})) as address:
            pin(monkeypatch, MMVet, address)
            assert scored() == own
            assert command.main(["fetch", "mm_vet", "--data", str(tmp_path)]) == 0
        assert "judge_prompt.json has the judge's official prompt, word for word" in capsys.readouterr().out
        found = scored()
        assert scored(wording="own") == own and scored(wording="official") == found
    texts = [last_text(body) for body in server.requests]
    assert len(texts) == 4 and texts[2:] == [  # two for each wording: nothing of the other's replies is used
        "Grade it.\na | b | c | d\n\nQ? | 1 <AND> 2 | p | ",
        "Grade it.\na | b | c | d\n\nQ? | 1 <AND> 2 | p | \nSay a digit: ",
    ]
    assert (own["wording"], found["wording"]) == ("povid-1", "official") and own["prompt"] != found["prompt"]


def test_the_other_prompts_as_they_are_sent(tmp_path, monkeypatch):
    """MMHal's contents, MMBench's options with a line break after each, and a rule for each of LLaVA's categories."""
    from povid.benchmarks import llava_bench, mmbench, mmhal

    def sent(kind, *arguments) -> Request:
        official(monkeypatch, kind, tmp_path / kind.__name__)
        words = wording.choose(kind(data=tmp_path / kind.__name__), None).parts
        return {MMHal: mmhal, MMBench: mmbench, LLaVABench: llava_bench}[kind].request(words, "n", *arguments)

    request = sent(MMHal, ["Cat", "Dog"], "Q {}", "T", "A")
    assert request.messages == [{"role": "user", "content": "Judge this, please.\nCat, Dog\n/ Q {} / T / A\nRating:"}]
    request = sent(MMBench, "Q", {"A": "x", "B": "y"}, "z", 2)
    assert request.messages[0]["content"] == "Match. Q: Q? O: Several: \nA. x\nB. y\n A: z Out:" and request.sample == 2
    request = sent(LLaVABench, "detail", "C", "Q", "R", "{A}")
    assert [message["content"] for message in request.messages] == [
        "You check {answers}.",
        "<Context>\nC\n<Question>Q\n{x}<Helper 1>R<Helper 2>{A}\nRate detail.!",
    ]


def test_our_own_wording_is_what_it_was():
    """Replies that were paid for under povid-1 are still found."""
    for kind, digest in (
        (MMHal, "4d52cda1cb36f621"),
        (MMVet, "39babd0cdc86b9b3"),
        (LLaVABench, "1baee901044a5826"),
        (MMBench, "78487d0b5f1c9b74"),
    ):
        assert (kind.wording, wording.Wording(kind.wording, kind.own_prompt()).digest) == ("povid-1", digest)


def test_a_fallback_is_said_and_official_insists(tmp_path, monkeypatch, caplog):
    judge = Judge(cache=tmp_path / "r.jsonl", base_url="http://x", model="m")
    assert judge.words(MMHal(data=tmp_path)).name == judge.words(MMHal(data=tmp_path)).name == "povid-1"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("mmhal: the judge is asked in our own wording (povid-1); `python -m povid.benchmarks fetch")
    strict = Judge(cache=tmp_path / "r.jsonl", base_url="http://x", model="m", wording="official")
    with pytest.raises(Fault, match=r"mmhal: .* holds no judge_prompt.json, the official prompt; run `python -m povid"):
        strict.endpoint(MMHal(data=tmp_path))


def test_what_is_not_the_official_text_is_not_taken_for_it(tmp_path, monkeypatch):
    """Another script, a changed prompt file, one of another version, and scripts in which the prompt is not found."""
    official(monkeypatch, MMHal, tmp_path)
    file = tmp_path / wording.FILE
    benchmark = MMHal(data=tmp_path)
    content = json.loads(file.read_text())
    for change, sentence in (
        ({"parts": {"prompt": content["parts"]["prompt"] + " Be kind."}}, "was changed after it was fetched; run `"),
        ({"parts": {}}, "was changed after it was fetched"),
        ({"sources": []}, "was read from another version of the official script; run `python -m povid.benchmarks"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(Fault, match=sentence):
            wording.choose(benchmark, None)
        assert wording.choose(benchmark, "own").name == "povid-1"
    put(MMHal, tmp_path, {"eval_gpt_mmhal.py": MMHAL + "\n"})
    with pytest.raises(Fault, match="is not the official script any more"):
        wording.store(MMHal, tmp_path)
    for kind, name, text, sentence in (
        (MMHal, "eval_gpt_mmhal.py", "template = 3", "found 0 times 'template', needed once"),
        (MMHal, "eval_gpt_mmhal.py", "template = (", "is not a Python script"),
        (MMHal, "eval_gpt_mmhal.py", "template = 'only {} and {}'", "prompt has another form than is known of it"),
        (MMVet, "mm-vet_evaluator.py", "prompt = 'x'", "found 0 times 'runs'"),
        (MMVet, "mm-vet_evaluator.py", MM_VET + "    a + 'more'", "found 2 times 'text that is appended'"),
        (LLaVABench, "eval_gpt_review_bench.py", LLAVA.replace("cap_str", "other"), "holds other, which is not known"),
        (LLaVABench, "rule.json", "{}", "rule.json has no rules"),
    ):
        scripts = SCRIPTS[kind] | {name: text}
        pin(monkeypatch, kind, scripts=scripts)
        put(kind, tmp_path / "b", scripts)
        with pytest.raises(Fault, match=sentence):
            wording.store(kind, tmp_path / "b")


def test_every_source_of_a_prompt_or_a_grading_is_pinned():
    for kind in SCRIPTS:
        for source in (*kind.prompt_sources, *getattr(kind, "graded", ())):
            commit = source.url.split("/")[5]
            assert len(commit) == 40 and int(commit, 16) and len(source.sha256) == 64 and source.size
