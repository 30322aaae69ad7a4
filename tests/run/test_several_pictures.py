"""Runs on records of several pictures or none, by a model of today: both stages, samples, identity, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import tiny_models
from forks import composed
from PIL import Image

from povid import files
from povid.fault import Fault
from povid.preferences.formats import povid
from povid.run.content import _pictures
from povid.run.experiment import run
from povid.run.identity import digest


def command(folder, *more: str) -> list[str]:
    return [
        f"outputs={folder}/out",
        "model=qwen3_vl",
        f"model.path={folder}/model",
        "model.dtype=float32",
        "model.max_length=256",
        "model.lora.r=4",
        "data=povid_17k",
        f"data.root={folder}",
        "data.workers=0",
        "trainer=auto",
        "stages.1.max_steps=1",
        "stages.2.max_steps=1",
        "stages.1.batch_size=2",
        "stages.2.batch_size=2",
        "samples=2",
        "logger=csv",
        "benchmarks=[]",
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-VL; the file ``pictures`` has records with one picture and two, ``text`` also one without."""
    place = tmp_path_factory.mktemp("several")
    tiny_models.save("qwen3_vl", place / "model")
    short, long, turns, uneven = tiny.triples(place)
    two = replace(long, image=(long.image, short.image))
    povid.write([two, uneven], place / "pictures.json", place)
    povid.write([two, replace(short, image=None), turns], place / "text.json", place)
    return place


def test_both_stages_train_on_several_pictures_and_show_them(folder, tmp_path):
    results = run(composed(*command(folder, "ablation=both", "data.file=pictures.json")), tmp_path / "run")
    assert set(results["stages"]) == {"1", "2"} and results["model"] == "qwen3_vl"
    records = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())["samples"]
    shown = {record["id"]: tmp_path / "run" / "samples" / record["picture"] for record in records}
    with Image.open(shown["long"]) as both, Image.open(shown["uneven"]) as one:
        assert both.width > 1.9 * one.width * both.height / one.height  # side by side
    assert all(record["noised"] for record in records)


def test_a_record_without_a_picture_trains_text_and_is_refused_or_skipped_where_noise_needs_one(folder, tmp_path):
    text = command(folder, "data.file=text.json")
    results = run(composed(*text, "ablation=text"), tmp_path / "text")
    assert set(results["stages"]) == {"1"}
    sentence = (
        r"text.json: records without a picture: 1 of 3 \(first: 'short'\); the noise dispreference needs one: remove "
        "them, skip them with data.skip_bad=true, or train with ablation=text"
    )
    with pytest.raises(Fault, match=sentence):
        run(composed(*text, "ablation=both"), tmp_path / "both")
    assert not (tmp_path / "both" / "stage_1").exists()
    needy = [*text, "ablation=text", "model.architecture={needs_image: true}"]
    with pytest.raises(Fault, match="1 of 3 .*model=qwen3_vl needs one: remove them, skip them with data.skip_bad"):
        run(composed(*needy), tmp_path / "needy")
    split = [*text, "ablation=text", "trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=1"]
    with pytest.raises(Fault, match="1 of 3 .*a projector that is split over devices"):
        run(composed(*split), tmp_path / "split")
    run(composed(*text, "ablation=noise", "data.skip_bad=true"), tmp_path / "skipped")
    note = json.loads((tmp_path / "skipped" / "stage_2" / "stage.json").read_text())
    assert note["records"] == 2


def test_the_identity_of_single_pictures_is_what_it_was_and_all_others_differ(tmp_path):
    """One picture a record: a digest over one digest a record. Which pictures stand together and how is told apart."""
    one, other = tiny.picture(tmp_path, "a", 1), tiny.picture(tmp_path, "b", 2)
    records = [tiny.triple(name, one, ("What is it", "A dog", "A cat")) for name in "xy"]

    def of(*images):
        return _pictures([replace(record, image=image) for record, image in zip(records, images)])

    assert of(one, other) == digest([files.digest(one, 2**19), files.digest(other, 2**19)])
    assert of((one,), other) == of(one, other)
    kinds = [(one, other), (one, (other, one)), (one, (one, other)), ((one, other), one), (one, None), (None, one)]
    assert len({of(*images) for images in kinds}) == len(kinds)
