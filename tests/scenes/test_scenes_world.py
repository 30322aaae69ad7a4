"""The embedded world's files: the same bytes every time, separate splits, statistics and constructions as set."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from povid.benchmarks import chair
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.pope import POPE
from povid.fault import Fault
from povid.preferences.differences import plural
from povid.preferences.formats import povid
from povid.scenes import world as world_file
from povid.scenes.__main__ import main
from povid.scenes.hallucination import WorldShares, draw_answer_pair, draw_caption_pair
from povid.scenes.language import Caption, Mention, Remark, draw_caption
from povid.scenes.painter import paint
from povid.scenes.scene import BASE_PARTNER, HARD_PARTNER, SIDE, draw_contextless, draw_scene
from povid.scenes.vocabulary import ANCHOR, KINDS, NAMES, PARTNER, synonyms_file
from povid.scenes.world import POPE_SPLITS, pope_rows, prepare

SMALL = {"preferences": 60, "tuning": 20, "evaluation": 20}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("worlds") / "world", **SMALL)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(3)
    return [
        (scene, draw_caption_pair(rng, scene, "?", WorldShares()))
        for scene in (draw_scene(rng, HARD_PARTNER) for _ in range(2000))
    ]


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def records(world: Path) -> list[dict]:
    return json.loads((world / "preferences.json").read_text(encoding="utf-8"))


def test_same_settings_give_the_same_bytes_in_another_process(world, tmp_path):
    command = [
        sys.executable,
        "-m",
        "povid.scenes",
        "prepare",
        str(tmp_path / "again"),
        "--preferences",
        "60",
        "--tuning",
        "20",
        "--evaluation",
        "20",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert fingerprint(tmp_path / "again") == fingerprint(world)


def test_a_complete_folder_is_left_alone(world):
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    assert prepare(world, **SMALL) == world
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_another_seed_gives_other_scenes_and_other_settings_an_error(world, tmp_path):
    other = prepare(tmp_path / "other", seed=1, **SMALL)
    assert (other / "preferences.json").read_bytes() != (world / "preferences.json").read_bytes()
    with pytest.raises(Fault, match="other settings \\(seed\\)"):
        prepare(world, seed=1, **SMALL)


def test_errors_leave_nothing_behind(tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(Fault, match="holds no embedded world"):
        prepare(mine, **SMALL)
    with pytest.raises(Fault, match="swap_share: found 2"):
        prepare(tmp_path / "new", swap_share=2)
    (tmp_path / "file").write_text("")
    assert main(["prepare", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_splits_share_no_picture(world):
    """Each split draws from its own stream, so that its size does not change the others."""
    prints = [digest for file, digest in fingerprint(world).items() if file.endswith(".png")]
    assert len(prints) == 100 and len(set(prints)) == 100


def test_size_of_one_split_leaves_the_others_alone(world, tmp_path):
    larger = prepare(tmp_path / "larger", preferences=5, tuning=20, evaluation=1)
    assert fingerprint(larger / "tuning") == fingerprint(world / "tuning")


def test_preferences_may_be_more_habitual_than_the_benchmarks(world, tmp_path):
    habitual = prepare(tmp_path / "habitual", **SMALL, preference_partner=1.0)
    assert fingerprint(habitual / "evaluation") == fingerprint(world / "evaluation")
    for record in records(habitual):
        assert all(PARTNER[name] in record["objects"] for name in record["objects"] if name in PARTNER)


def test_shares_decide_which_hallucinations_are_drawn(tmp_path):
    """The settings reach the records, and those that differ from the defaults are part of the folder's identity."""
    settings = {"preferences": 60, "tuning": 0, "evaluation": 0, "yes_no_share": 0}
    edits = {}
    for share in ("object_share", "swap_share"):
        folder = prepare(tmp_path / share, **settings, **{share: 0})
        edits[share] = Counter(record["edit"] for record in records(folder))
        with pytest.raises(Fault, match=f"other settings .*{share}"):
            prepare(folder, **settings)
    assert edits["object_share"]["flip"] + edits["object_share"]["count"] > 40  # the rest has nothing to flip
    assert edits["swap_share"]["swap"] == 0 < edits["swap_share"]["add"]
    assert "object_share" not in json.loads((tmp_path / "swap_share" / "manifest.json").read_text())


def test_partners_appear_with_their_anchors_as_often_as_configured():
    """About 4000 anchors, so one standard error is below 0.008."""
    for wanted in (BASE_PARTNER, HARD_PARTNER):
        rng = np.random.default_rng(0)
        scenes = [draw_scene(rng, wanted).names for _ in range(2000)]
        beside = [PARTNER[name] in names for names in scenes for name in names if name in PARTNER]
        assert abs(np.mean(beside) - wanted) < 0.03


def test_scenes_hold_three_to_seven_different_things_inside_the_picture():
    rng = np.random.default_rng(1)
    for scene in [draw_scene(rng, HARD_PARTNER) for _ in range(300)] + [draw_contextless(rng) for _ in range(50)]:
        assert 3 <= len(scene.names) <= 7 and len(set(scene.names)) == len(scene.names)
        assert all(
            0 <= left <= SIDE - side and 0 <= top <= SIDE - side
            for thing in scene.things
            for left, top, side in thing.boxes
        )


def test_paint_shows_each_thing():
    rng = np.random.default_rng(2)
    scene = draw_scene(rng, HARD_PARTNER)
    picture = np.asarray(paint(scene)).astype(int)
    assert picture.shape == (SIDE, SIDE, 3)
    ground = np.asarray(paint(type(scene)(scene.context, (), scene.ground))).astype(int)
    for thing in scene.things:
        left, top, side = thing.boxes[0]
        changed = np.abs(picture - ground)[top : top + side, left : left + side].max(-1) > 10
        assert changed.mean() > 0.08, thing


def test_every_name_and_plural_is_found_by_chair(tmp_path):
    (tmp_path / "synonyms.txt").write_text(synonyms_file(), encoding="utf-8")
    synonyms = chair.read_synonyms(tmp_path / "synonyms.txt")
    assert len(KINDS) == len(NAMES) == 36 and set(synonyms.values()) == set(NAMES)
    for name, kind in KINDS.items():
        assert any(len(word.split()) == 1 for word in kind.names)
        for word in kind.names:
            for spelt in (f"This image shows a {word}.", f"It contains two {plural(word)}, and more."):
                assert chair.objects(spelt, synonyms) == [name]


def test_true_captions_are_complete_and_true_for_chair(tmp_path):
    (tmp_path / "synonyms.txt").write_text(synonyms_file(), encoding="utf-8")
    synonyms = chair.read_synonyms(tmp_path / "synonyms.txt")
    rng = np.random.default_rng(4)
    for _ in range(400):
        scene = draw_scene(rng, HARD_PARTNER)
        assert set(chair.objects(str(draw_caption(rng, scene)), synonyms)) == set(scene.names)


def test_a_caption_is_spelt_as_expected():
    mentions = (Mention("umbrella", "umbrella", 1), Mention("mouse", "mouse", 2), Mention("cell phone", "phone", 1))
    caption = Caption(2, "office", mentions, Remark("umbrella", "left", "cell phone"))
    assert str(caption) == (
        "An office scene with an umbrella, two mice and a phone. The umbrella is to the left of the phone."
    )
    swapped = caption.exchange("cell phone", Mention("car", "automobile", 1))
    assert str(swapped) == (
        "An office scene with an umbrella, two mice and an automobile. The umbrella is to the left of the automobile."
    )


def test_the_three_causes_and_their_shares(pairs):
    causes = Counter(pair.cause for _, pair in pairs)
    edits = Counter(pair.edit for _, pair in pairs if pair.cause == "co-occurrence")
    assert causes["co-occurrence"] > 1000 and causes["relation"] > 60 and causes["attribute"] > 60
    assert abs(edits["swap"] / edits.total() - 0.7) < 0.05
    assert abs(edits["add"] - edits["merge"]) < 0.06 * edits.total(), "longer and shorter must balance"


def test_dispreferred_captions_hallucinate_and_preferred_ones_do_not(pairs, tmp_path):
    (tmp_path / "synonyms.txt").write_text(synonyms_file(), encoding="utf-8")
    synonyms = chair.read_synonyms(tmp_path / "synonyms.txt")
    for scene, pair in pairs[:600]:
        said, wrong = (set(chair.objects(text, synonyms)) for text in (pair.preferred, pair.dispreferred))
        assert said == set(scene.names)
        assert pair.preferred != pair.dispreferred
        lost, gained = len(said - wrong), len(wrong - said)
        if pair.cause != "co-occurrence":
            assert lost == gained == 0
        elif pair.edit == "swap":
            assert lost == gained and lost in (1, 2)
        else:
            assert (lost, gained) == ((0, 1) if pair.edit == "add" else (2, 1))


def test_hallucinated_objects_are_those_that_habit_expects(pairs, tmp_path):
    (tmp_path / "synonyms.txt").write_text(synonyms_file(), encoding="utf-8")
    synonyms = chair.read_synonyms(tmp_path / "synonyms.txt")
    expected = [
        ANCHOR.get(name) in scene.names
        for scene, pair in pairs
        if pair.cause == "co-occurrence"
        for name in set(chair.objects(pair.dispreferred, synonyms)) - set(scene.names)
    ]
    assert np.mean(expected) > 0.8


def test_swaps_alone_keep_the_number_of_words():
    rng = np.random.default_rng(5)
    for _ in range(1500):
        pair = draw_caption_pair(rng, draw_scene(rng, HARD_PARTNER), "?", WorldShares(swap_share=1))
        assert len(pair.preferred.split()) == len(pair.dispreferred.split()), pair


def test_yes_no_pairs_are_true_and_balanced():
    rng = np.random.default_rng(6)
    yes = 0
    for _ in range(1000):
        scene = draw_scene(rng, HARD_PARTNER)
        pair = draw_answer_pair(rng, scene, WorldShares())
        asked = pair.prompt.removeprefix("Is there an " if " an " in pair.prompt else "Is there a ")
        assert {pair.preferred, pair.dispreferred} == {"Yes", "No"}
        assert (pair.preferred == "Yes") == (asked.removesuffix(" in the image?") in scene.names)
        yes += pair.preferred == "Yes"
    assert 430 < yes < 570


def test_records_are_povids(world):
    triples = povid.read(world / "preferences.json", world)
    assert len(triples) == 60 and len({triple.id for triple in triples}) == 60
    assert all(Path(triple.image).is_file() for triple in triples)
    found = records(world)
    assert sum(record["edit"] == "answer" for record in found) == 15
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in found)


def test_benchmarks_load(world):
    for split in ("tuning", "evaluation"):
        captions = CHAIR(data=world / split).questions()
        assert len(captions) == 20 and all(Path(question.image).is_file() for question in captions)
        questions = POPE(data=world / split, suffix="").questions()
        assert len(questions) == 3 * 6 * 20
        assert Counter(question.meta["label"] for question in questions) == {"yes": 180, "no": 180}


@pytest.mark.parametrize("split", POPE_SPLITS)
def test_pope_asks_true_questions_in_turns(world, split):
    objects = json.loads((world / "tuning" / "objects.json").read_text())
    lines = (world / "tuning" / f"coco_pope_{split}.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in rows] == list(range(1, 121))
    assert [row["label"] for row in rows] == ["yes", "no"] * 60
    asked: dict[str, list[str]] = {}
    for row in rows:
        name = next(
            name
            for name in NAMES
            if row["text"] in (f"Is there a {name} in the image?", f"Is there an {name} in the image?")
        )
        assert ("an" in row["text"].split()) == (name[0] in "aeiou")
        assert (row["label"] == "yes") == (name in objects[Path(row["image"]).stem])
        asked.setdefault(row["image"], []).append(name)
    assert all(len(names) == len(set(names)) == 6 for names in asked.values())


def test_pope_negatives_are_the_official_ones():
    """Frequency: cow 3, horse 2, car 2, dog 1. In the first picture (cow, car) the absent objects are horse (2) and
    dog (1), so the popular negatives come in that order; beside the car in other pictures only a dog was seen (1, horse
    0), beside the cow only horses (2)."""
    objects = [("cow", "car"), ("cow", "horse"), ("cow", "horse"), ("car", "dog")]
    files = [f"{i}.png" for i in range(4)]

    def negatives(split: str) -> list[str]:
        rows = pope_rows(np.random.default_rng(0), files, objects, [("car", "cow"), (), (), ()], objects, split)
        return [row["text"] for row in rows if row["label"] == "no"]

    assert negatives("popular") == ["Is there a horse in the image?", "Is there a dog in the image?"]
    assert negatives("adversarial") == ["Is there a dog in the image?", "Is there a horse in the image?"]


def test_adversarial_negatives_are_what_habit_expects(tmp_path):
    """Asked about an anchor whose partner is missing, the adversarial split mostly asks for that partner next."""
    world = prepare(tmp_path / "large", preferences=0, tuning=150, evaluation=0)
    objects = json.loads((world / "tuning" / "objects.json").read_text())
    rows = [json.loads(line) for line in (world / "tuning" / "coco_pope_adversarial.json").read_text().splitlines()]
    asked_for_partner = [
        f" {partner} in the image?" in negative["text"]
        for positive, negative in zip(rows[::2], rows[1::2])
        for anchor, partner in PARTNER.items()
        if f" {anchor} in the image?" in positive["text"] and partner not in objects[Path(positive["image"]).stem]
    ]
    assert len(asked_for_partner) > 50 and np.mean(asked_for_partner) > 0.8


def test_what_a_killed_process_left_is_removed(tmp_path):
    """A process that dies half-way through writes nothing under the folder's name; the next one clears up after it."""
    pid = os.fork()
    if pid == 0:
        try:
            world_file._write_habits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            prepare(tmp_path / "world", **SMALL)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "world").exists()
    assert (half := [entry for entry in tmp_path.iterdir() if entry.is_dir()])
    prepare(tmp_path / "world", **SMALL)
    assert not any(folder.exists() for folder in half)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == [tmp_path / "world"]
