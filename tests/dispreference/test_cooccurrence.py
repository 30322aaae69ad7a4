"""The hallucinator without an endpoint."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from shared import shared

from povid.dispreference.annotations import key_of, read_objects
from povid.dispreference.causes import learn
from povid.dispreference.cooccurrence import CoOccurrence
from povid.dispreference.rewriting import Rewriting, hallucinate
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault
from povid.preferences.check import check
from povid.preferences.differences import changes, objects, plural, words
from povid.preferences.formats import povid
from povid.preferences.triple import Triple, Turn
from povid.scenes.hallucination import HABITS
from povid.scenes.scene import BASE_PARTNER, draw_scene
from povid.scenes.vocabulary import PARTNER

ROOT = Path(__file__).resolve().parents[2]

PRESENT = {str(n): ["fork", "knife"] for n in range(1, 10)} | {"10": ["fork", "cup"], "11": ["dog", "person"]}


def test_companions_by_their_likelihood():
    """Ten pictures have a fork, nine of them a knife, one a cup: P(knife | fork) = 0.9, P(cup | fork) = 0.1."""
    learned = learn(PRESENT)
    assert learned.companions(["fork"]) == [("knife", 0.9), ("cup", 0.1)]
    assert learned.companions(["fork", "knife"]) == [("cup", 0.1)]
    assert learned.companions(["zebra"]) == []
    assert [name for name, _ in learned.likely({"zebra"})][:2] == ["fork", "knife"]
    assert learned.leader("knife", ["cup", "dog", "fork"]) == 2 and learned.leader("knife", ["dog"]) is None


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


def test_short_answers_stay_short_and_become_wrong():
    kinds = {"Yes.": "relation", "Two": "count", "Red.": "attribute", "12": "count", "A dog.": "object"}
    for answer, kind in kinds.items():
        for seed in range(10):
            wrong = hallucinate(row(answer, question="What?"), learn(PRESENT), seed)
            assert changes(answer, wrong).kinds == {kind} and len(words(wrong)) <= 4
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
    triples = povid.read(tmp_path / "a.json", sample)
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
    said = {hallucinate(row(answer), learned, seed, Rewriting(object_share=1)) for seed in range(40)}
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
        len(words(hallucinate(row(answer, "0x"), learned, seed, Rewriting(object_share=1)))) - len(words(answer))
        for seed in range(1000)
    )
    assert set(lengths) == {-2, 0, 2} and lengths[0] > 600 and abs(lengths[2] - lengths[-2]) < 60


def test_a_word_is_replaced_everywhere_in_both_numbers():
    learned = learn({"1": ["bus", "airplane"], "10": ["bus"]})
    only_objects = Rewriting(prose_swap_share=1, further_edits=(0,))
    said = "Three buses can be seen: a red bus and an old bus to the left."
    wrong = "Three airplanes can be seen: a red airplane and an old airplane to the left."
    assert {hallucinate(row(said), learned, seed, only_objects) for seed in range(10)} == {wrong}


def test_shares_decide_how_often_an_object_replaces_another():
    learned = learn({str(n): ["car", "dog", "kite"] for n in range(5)})
    answer = "This shows a car, a cup, a fork and a dog."
    for swap_share, lengths in ((1.0, {0}), (0.0, {-2, 2})):
        settings = Rewriting(object_share=1, swap_share=swap_share)
        made = {len(words(hallucinate(row(answer, "0x"), learned, seed, settings))) for seed in range(60)}
        assert {length - len(words(answer)) for length in made} == lengths
    for invalid in ({"swap_share": 1.1}, {"object_share": -0.1}, {"further_edits": ()}, {"swap": 0.5}):
        with pytest.raises(ValidationError):
            CoOccurrence(**invalid)


def test_the_embedded_worlds_habits_are_what_counting_its_scenes_finds():
    """P(partner | anchor) is 0.95 by construction; no other object is as likely beside an anchor."""
    rng = np.random.default_rng(0)
    learned = learn({str(n): draw_scene(rng, BASE_PARTNER).names for n in range(3000)})
    for anchor, partner in PARTNER.items():
        (first, odds), *_ = learned.companions([anchor])
        assert first == partner and abs(odds - HABITS.likelihood(partner, anchor)) < 0.04


def test_dispreferred_responses_are_made_anew_in_every_turn():
    triples = [triple("1", "A fork and a spoon.", "Yes.", present=("fork", "spoon")), triple("2", "A fork is here.")]
    made = CoOccurrence()(triples, 0)
    assert [one.preferred for one in made] == [one.preferred for one in triples]
    for one in made:
        assert all(new.text != old.text for new, old in zip(one.dispreferred, one.preferred) if old.role == "assistant")
        assert "Given." not in [turn.text for turn in one.dispreferred]
    assert CoOccurrence()(triples, 0) == made and CoOccurrence()(triples, 0, limit=1) == made[:1]
    assert any(CoOccurrence()(triples, seed) != made for seed in range(1, 40))


def test_what_cannot_be_rewritten_is_named_or_skipped(tmp_path):
    stranger = replace(triple("3", "A fork is here."), meta={})
    with pytest.raises(Fault, match="these records do not say; give data.objects=FILE"):
        CoOccurrence()([stranger], 0)
    with pytest.raises(Fault, match="cannot rewrite 1 of 2 records .first: record '3': nothing says"):
        CoOccurrence()([triple("1", "A fork."), stranger], 0)
    skipped: list[str] = []
    assert [one.id for one in CoOccurrence()([triple("1", "A fork."), stranger], 0, skipped=skipped)] == ["1"]
    assert len(skipped) == 1
    (tmp_path / "o.json").write_text('{"other": ["cup"]}')
    with pytest.raises(Fault, match="cannot rewrite any record"):
        CoOccurrence(objects=tmp_path / "o.json")([stranger], 0, skipped=[])


def test_a_run_sees_what_the_command_writes(tmp_path, sample):
    """train.py and python -m povid.dispreference make the same sentences."""
    rows, triples = read_rows(sample / "preferences.json", sample), povid.read(sample / "preferences.json", sample)
    rewriter = CoOccurrence(objects=sample / "objects.json")
    made = rewriter.generate(rows, tmp_path, 3)
    assert not made.rejects
    assert [one.dispreferred for one in made.triples] == [one.dispreferred for one in rewriter(triples, 3)]


def test_a_denied_yes_denies_what_follows():
    for said, flipped in (
        ("Yes, there is a dog.", r"No, there is no \w+"),
        ("No, there is no umbrella.", r"Yes, there is an? \w+"),
        ("No, there are no dogs.", r"Yes, there are some \w+"),
    ):
        made = [hallucinate(row(said), learn({}), seed, Rewriting(further_edits=(4,))) for seed in range(30)]
        assert all(re.match(flipped, one) for one in made), made
    assert hallucinate(row("no."), learn({}), 0) == "yes."
