"""The hallucinator without an endpoint."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared import shared

from povid.dispreference import cooccurrence
from povid.dispreference.cooccurrence import hallucinate, instead, key_of, learn, read_objects
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault
from povid.preferences.check import check
from povid.preferences.differences import changes, mentions, objects, plural, words
from povid.preferences.formats import read
from povid.preferences.triple import Triple, Turn
from povid.scenes.hallucination import HABITS
from povid.scenes.scene import BASE_PARTNER, draw_scene
from povid.scenes.vocabulary import PARTNER

ROOT = Path(__file__).resolve().parents[2]

PRESENT = {str(n): ["fork", "knife"] for n in range(1, 10)} | {"10": ["fork", "cup"], "11": ["dog", "person"]}


def test_companions_by_their_likelihood():
    """Ten pictures have a fork, nine of them a knife, one a cup: P(knife | fork) = 0.9, P(cup | fork) = 0.1."""
    learned = learn(PRESENT)
    assert learned.companions(["fork"], []) == [("knife", 0.9), ("cup", 0.1)]
    assert learned.companions(["fork"], ["knife"]) == [("cup", 0.1)]
    assert learned.companions(["zebra"], []) == []
    assert [name for name, _ in cooccurrence._likely({"zebra"}, learned)][:2] == ["fork", "knife"]


def test_attributes_come_from_captions():
    assert learn({}, ["A red bus and a red car.", "The blue bus."]).looks["bus"] == {"red": 1, "blue": 1}


def row(answer: str, id: str = "10", question: str = "Describe this image.") -> Row:
    return Row(id, Path(f"{id}.png"), question, answer, "captioning")


def test_the_companion_that_is_absent_is_injected_most():
    learned = learn(PRESENT)
    added = Counter()
    for seed in range(200):
        added.update(changes("A fork lies there.", hallucinate(row("A fork lies there."), learned, seed)).objects)
    assert added.most_common(1)[0][0] == "knife" and added["cup"] == 0  # the cup is in the picture


def test_nothing_but_seed_and_record_decides():
    learned, answer = learn(PRESENT), "Two dogs stand left of a red car and a wooden bench, and a man holds a cup."
    random.seed(1)
    first = [hallucinate(row(answer), learned, seed) for seed in range(20)]
    random.seed(2)
    assert [hallucinate(row(answer), learned, seed) for seed in range(20)] == first
    assert len(set(first)) > 10


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [("Yes.", {"relation"}), ("Two", {"count"}), ("Red.", {"attribute"}), ("12", {"count"}), ("A dog.", {"object"})],
)
def test_short_answers_stay_short_and_become_wrong(answer, kinds):
    for seed in range(10):
        wrong = hallucinate(row(answer, question="What?"), learn(PRESENT), seed)
        assert changes(answer, wrong).kinds == kinds and len(words(wrong)) <= 4
        assert wrong[-1] == "." or answer[-1] != "."


def test_articles_plurals_and_capitals_fit():
    learned = learn({"1": ["knife", "oven"], "2": ["knife", "oven"], "3": ["car", "airplane"]})
    said = {hallucinate(row("A car is here.", "3x"), learned, seed) for seed in range(60)}
    assert not any(" a airplane" in one or "A airplane" in one for one in said)
    assert plural("knife") == "knives" and plural("bus") == "buses"


def test_objects_from_coco_and_from_a_list(tmp_path):
    coco = {
        "images": [{"id": 42, "file_name": "COCO_train2014_000000000042.jpg"}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [{"image_id": 42, "category_id": 3}, {"image_id": 42, "category_id": 3}],
    }
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert read_objects(tmp_path / "a.json") == {"42": ["car", "car"]}
    (tmp_path / "b.json").write_text(json.dumps({"000000000042": ["car"]}))
    assert read_objects(tmp_path / "b.json") == {"42": ["car"]}
    assert key_of("a/COCO_train2014_000000000042.jpg") == key_of("000000000042.jpg") == "42"
    lost = coco | {"annotations": [{"image_id": 1, "category_id": 3}]}
    for broken in ({"a": 3}, {"a": [1]}, lost, coco | {"images": 3}, []):
        (tmp_path / "c.json").write_text(json.dumps(broken))
        with pytest.raises(Fault, match="c.json"):
            read_objects(tmp_path / "c.json")


@pytest.fixture
def sample() -> Path:
    """Eight photographs with preferences and objects."""
    return shared("real_sample")


def test_on_the_real_sample_every_answer_becomes_wrong_and_nothing_true_is_injected(sample):
    rows, present = read_rows(sample / "preferences.json", sample), read_objects(sample / "objects.json")
    learned = learn(present, [one.answer for one in rows])
    for seed in range(30):
        for one in rows:
            wrong = hallucinate(one, learned, seed)
            found = changes(one.answer, wrong)
            assert found.kinds
            assert not set(found.objects) & set(present[key_of(one.image.name)]) - set(objects(one.answer))


def test_the_command_on_the_real_sample(tmp_path, sample):
    command = [
        sys.executable,
        "-m",
        "povid.dispreference",
        "dispreference=cooccurrence",
        f"images={sample}",
        f"input={sample}/preferences.json",
        f"objects={sample}/objects.json",
    ]
    for name in ("a", "b"):
        ended = subprocess.run([*command, f"out={tmp_path}/{name}.json"], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    triples = read("povid", tmp_path / "a.json", sample)
    assert len(triples) == 8 and check(triples).sound
    assert "8 records written, 0 set aside" in ended.stdout
    page = (tmp_path / "a.json.run" / "report.html").read_text()
    assert page.count("<article>") == 8 and page.count("<img") == 8


def triple(id: str, *said: str, present=("fork", "knife")) -> Triple:
    asked = [(Turn("user", f"What {n}?"), Turn("assistant", one)) for n, one in enumerate(said)]
    turns = tuple(turn for pair in asked for turn in pair)
    return Triple(
        id, Path(f"{id}.png"), turns, (*turns[:-1], Turn("assistant", "Given.")), "test", {"objects": list(present)}
    )


def test_an_enumeration_takes_any_object_and_one_more():
    learned = learn({str(n): ["car", "dog", "kite"] for n in range(5)} | {"10": ["car", "dog"]})
    answer = "This shows a car and a small dog."
    said = {cooccurrence._swap_or_join(answer, {"car", "dog"}, learned, random.Random(n), False) for n in range(40)}
    assert said == {"This shows a car and a small kite.", "This shows a car, a kite and a small dog."}


def test_in_an_enumeration_one_thing_is_wrong_and_stands_behind_what_suggests_it():
    """A fork suggests a knife (0.9); seven answers in ten name it, the others have a wrong number."""
    learned, answer = learn(PRESENT), "This shows a fork, a cup and a spoon."
    said = Counter(hallucinate(row(answer, "11x"), learned, seed) for seed in range(300))
    assert 180 < sum(count for one, count in said.items() if "knife" in one) < 240
    assert all(("a fork, a knife" in one) != ("two" in one) for one in said)


def test_in_enumerations_as_many_become_longer_as_shorter():
    learned = learn({str(n): ["car", "dog", "kite"] for n in range(5)}, synonyms={"pooch": "dog"})
    answer = "This shows a car, a cup, a fork and a pooch."
    lengths = Counter(
        len(words(cooccurrence._swap_or_join(answer, {"car", "dog"}, learned, random.Random(n), False)))
        - len(words(answer))
        for n in range(1000)
    )
    assert set(lengths) == {-2, 0, 2} and lengths[0] > 600 and abs(lengths[2] - lengths[-2]) < 60


def test_a_word_is_replaced_everywhere_in_both_numbers():
    said = "Three buses can be seen: a red bus and an old bus on the left."
    named = mentions(said)
    assert cooccurrence._replaced(said, named[1], "airplane", named) == (
        "Three airplanes can be seen: a red airplane and an old airplane on the left."
    )


def test_the_embedded_worlds_habits_are_what_counting_its_scenes_finds():
    """P(partner | anchor) is 0.95 by construction; no other object is as likely beside an anchor."""
    rng = np.random.default_rng(0)
    learned = learn({str(n): draw_scene(rng, BASE_PARTNER).names for n in range(3000)})
    for anchor, partner in PARTNER.items():
        (first, odds), *_ = learned.companions([anchor])
        assert first == partner and abs(odds - HABITS.likelihood(partner, anchor)) < 0.04


def test_dispreferred_responses_are_made_anew_in_every_turn():
    triples = [triple("1", "A fork and a spoon.", "Yes.", present=("fork", "spoon")), triple("2", "A fork is here.")]
    made = instead(triples, 0)
    assert [one.preferred for one in made] == [one.preferred for one in triples]
    for one in made:
        assert all(new.text != old.text for new, old in zip(one.dispreferred, one.preferred) if old.role == "assistant")
        assert "Given." not in [turn.text for turn in one.dispreferred]
    assert instead(triples, 0) == made and instead(triples, 0, limit=1) == made[:1]
    assert any(instead(triples, seed) != made for seed in range(1, 40))


def test_what_cannot_be_rewritten_is_told_or_skipped(tmp_path):
    stranger = replace(triple("3", "A fork is here."), meta={})
    with pytest.raises(Fault, match="these records do not say; give data.objects=FILE"):
        instead([stranger], 0)
    with pytest.raises(Fault, match="cannot rewrite 1 of 2 records .first: record '3': nothing says"):
        instead([triple("1", "A fork."), stranger], 0)
    skipped: list[str] = []
    assert [one.id for one in instead([triple("1", "A fork."), stranger], 0, skipped=skipped)] == ["1"]
    assert len(skipped) == 1
    (tmp_path / "o.json").write_text('{"other": ["cup"]}')
    with pytest.raises(Fault, match="could rewrite no record"):
        instead([stranger], 0, objects=tmp_path / "o.json", skipped=[])


def test_a_run_sees_what_the_command_writes(tmp_path, sample):
    """The same sentences, whichever door: train.py's rewriting and python -m povid.dispreference."""
    rows, triples = read_rows(sample / "preferences.json", sample), read("povid", sample / "preferences.json", sample)
    learned = learn(read_objects(sample / "objects.json"), [one.answer for one in rows])
    written, _, rejects = cooccurrence.rewrite(rows, learned, 3)
    assert not rejects and [one.dispreferred for one in written] == [
        one.dispreferred for one in instead(triples, 3, objects=sample / "objects.json")
    ]


@pytest.mark.parametrize(
    "said, wrong",
    [
        ("Yes, there is a dog.", "No, there is no dog."),
        ("No, there is no umbrella.", "Yes, there is an umbrella."),
        ("No, there are no dogs.", "Yes, there are some dogs."),
        ("Yes", "No"),
        ("no.", "yes."),
    ],
)
def test_a_denied_yes_denies_what_follows(said, wrong):
    assert cooccurrence._yes_no(said, learn({}), random.Random(0)) == wrong


def test_left_and_right_are_exchanged_where_they_are_places():
    learned = learn({})
    for said in ("He left the room.", "That is right, he has gone."):
        assert cooccurrence._relation(said, learned, random.Random(0)) == said
    assert (
        cooccurrence._relation("He left by the door on the left.", learned, random.Random(0))
        == "He left by the door on the right."
    )


def test_an_options_letter_is_left_alone():
    learned = learn({"11": ["dog"], "12": ["dog", "cat"]})
    assert [hallucinate(row(said, "11x"), learned, 0) for said in ("B", "(C)", "A.")] == ["B", "(C)", "A."]
