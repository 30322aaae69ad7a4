"""Pairs from what a policy says: which pair is taken, who judges, what a kill loses, and rounds of training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hydra import compose, initialize_config_dir
from servers import ChatServer, Say, Status, last_text

from povid.dispreference import rounds
from povid.dispreference.__main__ import run
from povid.dispreference.generate import Sampling, VisionModel, folder_of
from povid.dispreference.judging import CONTRADICTORY, NO_OBJECTS, UNREADABLE, Annotations, Reading, VisionJudge, parse
from povid.dispreference.on_policy import ALL_THE_SAME, EQUALLY_FALSE, NOT_COMPARABLE, OnPolicy, Tolerances, choose
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault
from povid.machine import conf_folder
from povid.model.adapters import adapter_digest
from povid.model.generation import Answers
from povid.preferences.check import check
from povid.preferences.formats import povid
from povid.server.endpoint import EndpointSettings

ROOT = Path(__file__).resolve().parents[2]


# --- which pair ---


def reading(true: str, false: str = "") -> Reading:
    return Reading(frozenset(true.split()), frozenset(false.split()))


def test_the_pair_with_the_largest_difference_at_equal_coverage_and_length_is_taken():
    """Five captions of five words; d names three false objects but one true object less, so that c, with two, stays."""
    said = ["a a a a a", "b b b b b", "c c c c c", "d d d d d", "e e e e e"]
    read = [reading("dog cat", "bus"), reading("dog cat"), reading("dog cat", "bus tv"), reading("dog", "x y z")]
    read.append(reading("cat tree", "bus tv"))  # as good as c, sampled later
    assert choose(said, read, Tolerances()) == (1, 2)
    assert choose(said, read, Tolerances(coverage=1)) == (1, 3)
    said[2] = "c c c c"  # still within a fifth, but e is of equal length now
    assert choose(said, read, Tolerances()) == (1, 4)
    said[2] = said[4] = "too short"
    assert choose(said, read, Tolerances()) == (1, 0)


def test_a_picture_without_a_pair_has_a_reason():
    same = [reading("dog"), reading("dog", "tv")]
    assert choose(["a dog", "a dog"], same, Tolerances()) == ALL_THE_SAME
    assert choose(["a dog", " "], same, Tolerances()) == ALL_THE_SAME
    assert choose(["a dog", "one dog"], [reading("dog", "tv"), reading("dog", "bus")], Tolerances()) == EQUALLY_FALSE
    assert choose(["a dog", "a very long dog"], same, Tolerances()) == NOT_COMPARABLE
    assert choose(["a dog", "a cat"], [reading("dog"), reading("", "cat")], Tolerances()) == NOT_COMPARABLE


# --- who judges ---

SYNONYMS = "person, man, woman\ndog, puppy\ncat\nbus\ncar\numbrella\ntree\ntv, television\n"


def row(id: str, objects: tuple[str, ...] | None = None, image: Path | bytes = b"") -> Row:
    return Row(id, image or Path(f"{id}.png"), "Describe this image.", "", "captioning", (), objects)


def test_annotations_judge_in_chairs_words(tmp_path):
    """A file of annotations takes precedence over a record's own list; a bus is a bus, which CHAIR's script misses."""
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    said = [["Two puppies and a man watch television.", "A bus."]]
    judge = Annotations(synonyms=tmp_path / "synonyms.txt")
    assert judge.read([row("1", ("dog", "woman"))], said, tmp_path) == [
        [reading("dog person", "tv"), reading("", "bus")]
    ]
    assert judge.read([row("1")], said, tmp_path) == [NO_OBJECTS]
    coco = {
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}],
        "categories": [{"id": 1, "name": "bus"}],
        "annotations": [{"image_id": 7, "category_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    judge = Annotations(synonyms=tmp_path / "synonyms.txt", objects=tmp_path / "instances.json")
    pictured = row("other", ("dog",), tmp_path / "COCO_train2014_000000000007.jpg")
    assert judge.read([pictured], said, tmp_path) == [[reading("", "dog person tv"), reading("bus")]]
    with pytest.raises(Fault, match=r"record '1': its picture holds 'unicorn', which is not in .*synonyms.txt"):
        judge.read([row("1", ("unicorn",))], said, tmp_path)
    with pytest.raises(Fault, match="synonyms is not set"):
        Annotations().identity([])


def test_a_folder_of_cocos_annotations_counts_what_people_say(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    images = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}]
    instances = {"images": images, "categories": [{"id": 1, "name": "bus"}]}
    instances["annotations"] = [{"image_id": 7, "category_id": 1}]
    captions = {"images": images, "annotations": [{"image_id": 7, "caption": "A puppy in a bus."}]}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    (tmp_path / "captions_val2014.json").write_text(json.dumps(captions))
    judge = Annotations(synonyms=tmp_path / "synonyms.txt", objects=tmp_path)
    pictured = row("7", None, Path("COCO_val2014_000000000007.jpg"))
    assert judge.read([pictured], [["A dog, a cat."]], tmp_path) == [[reading("dog", "cat")]]


def test_replies_of_a_judge():
    said = ["A dog.", "A cat.", "A dog."]
    good = {"1": {"seen": ["Dog"], "not_seen": []}, "2": {"seen": [], "not_seen": [" cat "]}}
    assert parse(f"```json\n{json.dumps(good)}\n```", said) == [reading("dog"), reading("", "cat"), reading("dog")]
    assert parse("no idea", said) == parse(json.dumps({"1": good["1"]}), said) == UNREADABLE
    assert parse(json.dumps(good | {"2": {"seen": "cat", "not_seen": []}}), said) == UNREADABLE
    assert parse(json.dumps(good | {"2": {"seen": [], "not_seen": ["dog"]}}), said) == CONTRADICTORY


def judge_of(server: ChatServer, **more) -> VisionJudge:
    settings = EndpointSettings(model="m", base_url=server.url, timeout=5.0, retries=0, backoff=0.001)
    return VisionJudge(endpoint=settings, sampling=Sampling(temperature=0.0, attempts=2), **more)


def test_a_judge_is_asked_again_when_its_reply_cannot_be_read_and_never_twice_for_the_same(tmp_path, capsys):
    """Of three pictures one is judged at once, one in the second attempt, one never."""
    rows = [row(str(n), None, tiny.picture(tmp_path, str(n), n)) for n in range(3)]
    said = [["A dog {n}.", f"A cat {n}."] for n in range(3)]
    fine = json.dumps({"1": {"seen": ["dog"], "not_seen": []}, "2": {"seen": [], "not_seen": ["cat"]}})

    def script(body, number):
        asked = last_text(body)
        assert "1. A dog {n}." in asked and len(body["messages"][0]["content"]) == 2
        return Say(fine if "cat 0" in asked or ("cat 1" in asked and body["seed"] == 1) else "{}")

    with ChatServer(script) as server:
        assert judge_of(server, estimate_only=True).read(rows, said, tmp_path) is None and not server.requests
        assert "3 pictures takes at most" in capsys.readouterr().err
        for _ in range(2):
            found = judge_of(server).read(rows, said, tmp_path)
            assert found == [[reading("dog"), reading("", "cat")]] * 2 + [UNREADABLE]
        assert len(server.requests) == 5
    with ChatServer(lambda body, n: Status(500)) as server:
        lost = [row("9", None, tiny.picture(tmp_path, "9", 9))]
        with pytest.raises(Fault, match="of 1 of 1 pictures were not judged .*start again"):
            judge_of(server).read(lost, said[:1], tmp_path)
        assert judge_of(server, give_up=True).read(lost, said[:1], tmp_path) == ["no reply"]


# --- the command ---


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny random model, six pictures that hold a dog, and a bus in every other one."""
    folder = tmp_path_factory.mktemp("on_policy")
    tiny.save_tiny_llava(folder / "tiny")
    (folder / "synonyms.txt").write_text(SYNONYMS)
    rows = [
        {
            "id": f"r{n}",
            "image": tiny.picture(folder, f"p{n}", n).name,
            "question": "Describe this image." if n else "Is there a dog",
            "objects": ["dog", "bus"] if n % 2 else ["dog"],
        }
        for n in range(7)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    return [
        "dispreference=on_policy",
        f"input={world}/rows.json",
        f"images={world}",
        f"synonyms={world}/synonyms.txt",
        f"model.path={world}/tiny",
        "model.max_length=400",
        f"out={out}",
        "dispreference.captions=6",
        "dispreference.max_new_tokens=20",
        "dispreference.batch_size=8",
        "dispreference.coverage_tolerance=1",
        "dispreference.length_tolerance=0.5",
        *more,
    ]


def start(*given: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        run(compose("dispreference", list(given)))


def test_a_killed_run_resumes_to_the_same_bytes(world, tmp_path, monkeypatch):
    """Killed after 17 of 36 captions, with half a line on disk."""
    calm, disturbed = tmp_path / "calm.json", tmp_path / "disturbed.json"
    start(*arguments(world, calm))
    kept = folder_of(disturbed) / "captions" / "answers.jsonl"
    honest, asked = Answers.__call__, []

    def dies(self, questions, decoding):
        for number, answer in enumerate(honest(self, questions, decoding)):
            if number == 17:
                raise SystemExit
            yield answer

    monkeypatch.setattr(Answers, "__call__", dies)
    with pytest.raises(SystemExit):
        start(*arguments(world, disturbed))
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 17 and not disturbed.exists()
    kept.write_bytes(b"".join(lines)[:-30])
    monkeypatch.setattr(
        Answers, "__call__", lambda self, questions, how: (asked.extend(questions), honest(self, questions, how))[1]
    )
    start(*arguments(world, disturbed))
    assert len(asked) == 36 - 16
    assert disturbed.read_bytes() == calm.read_bytes()

    triples = povid.read(calm, world)
    rejects = [json.loads(line) for line in (folder_of(calm) / "rejects.jsonl").read_text().splitlines()]
    report = json.loads((folder_of(calm) / "report.json").read_text())
    assert check(triples).sound and len(triples) >= 2 and len(triples) + len(rejects) == 7
    assert rejects[0] == {"id": "r0", "reasons": ["asks for no description"]}
    assert (report["captions"], report["pictures"]) == (36, 6)
    assert report["false_objects_preferred"] < report["false_objects_dispreferred"]

    # another choice among the same captions samples nothing; the file of the first choice is not overwritten
    with pytest.raises(Fault, match="exists and comes from other rows or settings"):
        start(*arguments(world, calm, "dispreference.length_tolerance=0.4"))
    calm.unlink()
    asked.clear()
    start(*arguments(world, calm, "dispreference.length_tolerance=0.4"))
    assert not asked


def test_captions_of_another_policy_are_refused(world, tmp_path):
    out = tmp_path / "pairs.json"
    start(*arguments(world, out))
    out.unlink()
    tiny.save_tiny_llava(tmp_path / "other", seed=1)
    for change, differs in (
        ("seed=1", "seed was 0 and is now 1"),
        ("dispreference.temperature=0.7", "temperature was 1.0 and is now 0.7"),
        (f"model.path={tmp_path}/other", "weights was"),
        ("dispreference.captions=5", "captions was 6 and is now 5"),
        ("model.system='Be brief.'", "model.system was"),
    ):
        with pytest.raises(Fault, match=f"captions was made with something else .*{re.escape(differs)}.*another out"):
            start(*arguments(world, out, change))
    start(*arguments(world, out, "model.lora.r=2", "model.name=renamed"))  # neither changes what is said


def test_a_served_policy_is_asked_for_every_sample_once(world, tmp_path):
    """What the server says depends on the seed of the request alone; another seed of the run asks anew."""
    words = ["A dog and a tv .", "A dog and a car .", "A dog and a tree and a cat .", "A bus and a dog ."]
    more = ["model=served", "model.model=m", f"model.cache={tmp_path}/served.jsonl", "dispreference.temperature=0.8"]
    with ChatServer(lambda body, n: Say(words[body["seed"] % 4])) as server:
        given = [each for each in arguments(world, tmp_path / "a.json", *more) if "model.max" not in each]
        given = [each for each in given if "model.path" not in each] + [f"model.base_url={server.url}"]
        start(*given)
        assert len(server.requests) == 36
        assert {body["temperature"] for body in server.requests} == {0.8}
        assert len({body["seed"] for body in server.requests}) == 36
        pairs = (tmp_path / "a.json").read_bytes()
        start(*[each.replace("a.json", "b.json") for each in given])
        assert len(server.requests) == 36 and (tmp_path / "b.json").read_bytes() == pairs
        start(*[each.replace("a.json", "c.json") for each in given], "seed=1")
        assert len(server.requests) == 72
        with pytest.raises(Fault, match="a served model cannot be trained here"):
            sampler = OnPolicy(model=served(server, tmp_path), judge=None)
            rounds.repeat(sampler, 2, tmp_path, lambda *_: True, lambda *_: None)


def test_a_vision_model_may_judge_what_the_policy_says(world, tmp_path):
    """Its own YAML and the command's endpoint; this judge sees a dog and nothing else in any picture."""

    def script(body, number):
        lines = re.findall(r"^(\d+)\. (.*)$", last_text(body), re.MULTILINE)
        named = {n: [word for word in ("dog", "bus", "cat", "car") if word in said.split()] for n, said in lines}
        sides = {
            n: {"seen": ["dog"] * ("dog" in all), "not_seen": [w for w in all if w != "dog"]}
            for n, all in named.items()
        }
        return Say(json.dumps(sides))

    with ChatServer(script) as server:
        more = [
            "dispreference=on_policy_judged",
            "endpoint.model=m",
            f"endpoint.base_url={server.url}",
            "synonyms=null",
        ]
        start(*arguments(world, tmp_path / "o.json", *more))
        assert len(server.requests) == 6
    report = json.loads((tmp_path / "o.json.run" / "report.json").read_text())
    assert report["written"] == len(povid.read(tmp_path / "o.json", world)) >= 1
    assert report["judge"] == "m" and report["replies"] == 6
    assert report["false_objects_preferred"] < report["false_objects_dispreferred"]


def served(server: ChatServer, folder: Path):
    from povid.model.served import ServedModel

    return ServedModel(name="m", model="m", base_url=server.url, cache=folder / "served.jsonl")


MISTAKES = [
    ("rounds=each", "rounds=each is now spelled questions=each"),
    ("rounds=0", "rounds=0: give a whole number of at least 1"),
    ("dispreference.captions=1", "captions: found 1, needed at least 2"),
    ("dispreference.temperature=0", "temperature: found 0, needed more than 0"),
    ("adapters=[nowhere]", "adapters: nowhere holds no adapter_config.json"),
    ("init_from=nowhere", "init_from: nowhere contains neither"),
    ("synonyms=null", "synonyms is not set"),
    ("prompt=reasoning", "no record asks for a description"),
    ("model.lora.rr=1", "model.lora.rr"),
]


@pytest.mark.parametrize(("change", "sentence"), MISTAKES, ids=lambda each: each)
def test_mistakes_are_one_sentence(world, tmp_path, change, sentence):
    change = f"+{change}" if "rr=" in change else change
    with pytest.raises(Fault, match=re.escape(sentence)):
        start(*arguments(world, tmp_path / "o.json", change))
    assert not (tmp_path / "o.json").exists()


def test_only_first_questions_are_asked(world, tmp_path):
    talk = [("human", "Describe this image."), ("gpt", "A dog."), ("human", "Describe the dog.")]
    record = {"id": "t", "image": "p1.png", "conversations": [{"from": who, "value": said} for who, said in talk]}
    (tmp_path / "talk.json").write_text(json.dumps([record]))
    assert len(read_rows(tmp_path / "talk.json", world, answered=False, questions="each")) == 2
    with pytest.raises(Fault, match="has an odd|must alternate"):
        read_rows(tmp_path / "talk.json", world)
    with pytest.raises(Fault, match="one question at a time"):
        start(*arguments(world, tmp_path / "o.json", f"input={tmp_path}/talk.json", "questions=each"))


# --- rounds ---


def test_each_round_samples_from_what_the_round_before_has_trained(tmp_path):
    """Training is replaced by an adapter's folder; the second round continues from the first one's."""
    seen = []

    def write(sampler, pairs):
        seen.append(("sample", pairs.parent.name, [adapter.parent.name for adapter in sampler.chain]))
        return True

    def train(number, pairs, adapters, run):
        seen.append(("train", number, [adapter.parent.name for adapter in adapters]))
        adapter = run / f"stage_{number}" / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text("{}")
        chain = {"init_from": [str(each) for each in adapters], "adapter_digest": adapter_digest(adapter)}
        (adapter.parent / "stage.json").write_text(json.dumps(chain))

    sampler = OnPolicy(model=tiny.settings(tmp_path), judge=None)
    last = rounds.repeat(sampler, 2, tmp_path / "run", write, train)
    assert seen == [
        ("sample", "round_1", []),
        ("train", 1, []),
        ("sample", "round_2", ["stage_1"]),
        ("train", 2, ["stage_1"]),
    ]
    assert [adapter.parent.name for adapter in last] == ["stage_1", "stage_2"]
    noted = json.loads((tmp_path / "run" / "rounds.json").read_text())
    assert [each["round"] for each in noted] == [1, 2] and noted[1]["adapters"] == list(map(str, last))


def test_overrides_of_a_round():
    assert rounds.overrides("stages.1.lr=1e-6 'row=my row' trainer=gpu") == [
        "stages.1.lr=1e-6",
        "row=my row",
        "trainer=gpu",
    ]
    assert rounds.quoted("it's") == r"'it\'s'"
    for given, sentence in (
        ("model.dtype=float32", "each round sets model.dtype itself"),
        ("resume=false", "each round sets resume itself"),
        ("-m seed=1", "'-m' is no override"),
        ("row='a", "close its quotes"),
    ):
        with pytest.raises(Fault, match=re.escape(sentence)):
            rounds.overrides(given)


def test_training_hears_of_a_signal_and_is_waited_for(tmp_path):
    """The child tells its parent to end, is told itself, writes a file and leaves with a status of its own."""
    script = """if True:
        import os, pathlib, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143)))
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    """
    assert rounds._call([sys.executable, "-c", script, str(tmp_path / "saved")]) == 143
    assert (tmp_path / "saved").exists()


def test_generators_without_a_policy_have_no_rounds(tmp_path):
    with pytest.raises(Fault, match="dispreference=endpoint samples from none"):
        rounds.repeat(VisionModel(), 1, tmp_path, lambda *_: True, lambda *_: None)


@pytest.mark.slow
def test_two_rounds_from_the_command_line_and_again(world, tmp_path):
    """The second start finds both rounds finished and writes the same file."""
    train = "stages.1.max_steps=2 stages.1.batch_size=2 logger=none benchmarks=[] samples=0 data.workers=0"
    command = [sys.executable, "-m", "povid.dispreference", *arguments(world, tmp_path / "pairs.json")]
    command += ["rounds=2", f'train="{train}"', f"outputs={tmp_path}"]
    written = []
    for starts in range(2):
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ended.stdout.count("finished already") == 2 * starts
        written.append((tmp_path / "pairs.json").read_bytes())
    pairs = written[0]
    assert written[1] == pairs
    place = folder_of(tmp_path / "pairs.json")
    noted = json.loads((place / "rounds.json").read_text())
    assert [len(each["adapters"]) for each in noted] == [1, 2]
    assert pairs == (place / "round_2" / "pairs.json").read_bytes() != (place / "round_1" / "pairs.json").read_bytes()
    first, second = (json.loads((place / f"round_{n}" / "run" / "results.json").read_text()) for n in (1, 2))
    assert (first["row"], second["row"]) == ("on_policy_1", "on_policy_2")
    assert second["adapters"] == noted[1]["adapters"] and second["adapters"][:1] == first["adapters"]
    assert "the last policy: adapters=[" in ended.stdout
