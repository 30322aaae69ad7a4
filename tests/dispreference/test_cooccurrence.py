"""The hallucinator without an endpoint."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from povid.dispreference import cooccurrence
from povid.dispreference.cooccurrence import hallucinate, key_of, learn, read_objects
from povid.dispreference.rows import Row, read_rows
from povid.fault import Fault
from povid.preferences.check import check
from povid.preferences.differences import changes, objects, words
from povid.preferences.formats import read

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT.parent / "shared" / "real_sample"

PRESENT = {str(n): ["fork", "knife"] for n in range(1, 10)} | {"10": ["fork", "cup"], "11": ["dog", "person"]}


def test_companions_by_their_likelihood():
    """Ten pictures have a fork, nine of them a knife, one a cup: P(knife | fork) = 0.9, P(cup | fork) = 0.1."""
    learned = learn(PRESENT)
    assert learned.companions(["fork"], []) == [("knife", 0.9), ("cup", 0.1)]
    assert learned.companions(["fork"], ["knife"]) == [("cup", 0.1)]
    assert [name for name, _ in learned.companions(["zebra"], [])][:2] == ["fork", "knife"]


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


@pytest.mark.parametrize(("answer", "kinds"), [("Yes.", {"relation"}), ("Two", {"count"}), ("Red.", {"attribute"}),
                                               ("12", {"count"}), ("A dog.", {"object"})])
def test_short_answers_stay_short_and_become_wrong(answer, kinds):
    for seed in range(10):
        wrong = hallucinate(row(answer, question="What?"), learn(PRESENT), seed)
        assert changes(answer, wrong).kinds == kinds and len(words(wrong)) <= 4
        assert wrong[-1] == "." or answer[-1] != "."


def test_articles_plurals_and_capitals_fit():
    learned = learn({"1": ["knife", "oven"], "2": ["knife", "oven"], "3": ["car", "airplane"]})
    said = {hallucinate(row("A car is here.", "3x"), learned, seed) for seed in range(60)}
    assert not any(" a airplane" in one or "A airplane" in one for one in said)
    assert cooccurrence._plural("knife") == "knives" and cooccurrence._plural("bus") == "buses"


def test_objects_from_coco_and_from_a_list(tmp_path):
    coco = {"images": [{"id": 42, "file_name": "COCO_train2014_000000000042.jpg"}],
            "categories": [{"id": 3, "name": "car"}],
            "annotations": [{"image_id": 42, "category_id": 3}, {"image_id": 42, "category_id": 3}]}
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


def sample() -> list[Row]:
    if not SAMPLE.is_dir():
        pytest.skip("the sample of eight photographs is not beside the project")
    return read_rows(SAMPLE / "preferences.json", SAMPLE)


def test_on_the_real_sample_every_answer_becomes_wrong_and_nothing_true_is_injected():
    rows, present = sample(), read_objects(SAMPLE / "objects.json")
    learned = learn(present, [one.answer for one in rows])
    for seed in range(30):
        for one in rows:
            wrong = hallucinate(one, learned, seed)
            found = changes(one.answer, wrong)
            assert found.kinds
            assert not set(found.objects) & set(present[key_of(one.image.name)]) - set(objects(one.answer))


def test_the_command_on_the_real_sample(tmp_path):
    sample()
    command = [sys.executable, "-m", "povid.dispreference", "dispreference=cooccurrence", f"images={SAMPLE}",
               f"input={SAMPLE}/preferences.json", f"objects={SAMPLE}/objects.json"]
    for name in ("a", "b"):
        ended = subprocess.run([*command, f"out={tmp_path}/{name}.json"], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    triples = read("povid", tmp_path / "a.json", SAMPLE)
    assert len(triples) == 8 and check(triples).sound
    assert "8 records written, 0 set aside" in ended.stdout
    page = (tmp_path / "a.json.run" / "report.html").read_text()
    assert page.count("<article>") == 8 and page.count("<img") == 8
