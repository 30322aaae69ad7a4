"""Readers of preference data on records in the published layouts, right and damaged."""

from __future__ import annotations

import base64
import copy
import errno
import io
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from shared import shared

from povid.fault import Fault
from povid.preferences import formats
from povid.preferences.__main__ import main
from povid.preferences.formats import human_preference, povid, rlaif_v, rlhf_v, trl, vlfeedback
from povid.preferences.stored import picture_bytes
from povid.preferences.triple import Triple, Turn

PICTURE = "COCO_train2014_000000000001.png"


def encoded(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, kind)
    return buffer.getvalue()


def talk(*turns: str) -> list[dict]:
    return [{"from": "human" if n % 2 == 0 else "gpt", "value": turn} for n, turn in enumerate(turns)]


def record(number: int = 1, **changes) -> dict:
    return {
        "id": f"COCO_train2014_{number:012d}",
        "image": f"./data/coco/COCO_train2014_{number:012d}.png",
        "conversations": talk("<image>\nDescribe this image.", "A red bus on a street."),
        "rejected_conversations": talk("<image>\nDescribe this image.", "A red bus and two bicycles on a street."),
    } | changes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"COCO_train2014_{number:012d}.png").write_bytes(encoded())
    return folder


def stored(folder: Path, value, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, value)) if name.endswith("l") else json.dumps(value))
    return path


# --- POVID ---


def test_povid_finds_the_picture_by_its_basename_and_drops_the_marker(tmp_path, images):
    (triple,) = povid.read(stored(tmp_path, [record()]), images)
    assert triple == Triple(
        "COCO_train2014_000000000001",
        images / "COCO_train2014_000000000001.png",
        (Turn("user", "Describe this image."), Turn("assistant", "A red bus on a street.")),
        (Turn("user", "Describe this image."), Turn("assistant", "A red bus and two bicycles on a street.")),
        "povid",
    )


def test_povid_prefers_more_of_the_path_to_the_basename(tmp_path, images):
    (images / "coco").mkdir()
    shorter = images / "coco" / "COCO_train2014_000000000001.png"
    shorter.write_bytes(encoded("green"))
    (triple,) = povid.read(stored(tmp_path, [record()]), images)
    assert triple.image == shorter
    (images / "data" / "coco").mkdir(parents=True)
    nested = images / "data" / "coco" / "COCO_train2014_000000000001.png"
    nested.write_bytes(encoded("blue"))
    (triple,) = povid.read(stored(tmp_path, [record()]), images)
    assert triple.image == nested


def test_povid_keeps_records_of_several_turns_whole(tmp_path, images):
    good = talk("<image>\nWhat is it?", "A bus.", "Which colour?", "Red.")
    bad = talk("<image>\nWhat is it?", "A tram.", "Which colour?", "Blue.")
    lines = stored(tmp_path, [record(conversations=good, rejected_conversations=bad)], "data.jsonl")
    (triple,) = povid.read(lines, images)
    assert [turn.text for turn in triple.preferred] == ["What is it?", "A bus.", "Which colour?", "Red."]
    assert [turn.text for turn in triple.dispreferred] == ["What is it?", "A tram.", "Which colour?", "Blue."]


def test_the_real_sample_reads_whole():
    sample = shared("real_sample")
    triples = povid.read(sample / "preferences.json", sample)
    assert len(triples) == 8
    assert triples[0].image == sample / "images" / "000000020556.jpg"
    assert all("<image>" not in turn.text for triple in triples for turn in triple.preferred + triple.dispreferred)


def test_povid_round_trip_with_pictures_as_bytes(tmp_path):
    asked = Turn("user", "What?")
    triples = [
        Triple(
            f"a/{n}",
            encoded(colour),
            (asked, Turn("assistant", "Ein Käfer.")),
            (asked, Turn("assistant", "Zwei.")),
            "povid",
        )
        for n, colour in enumerate(("red", "blue"))
    ]
    folder = tmp_path / "pictures"
    povid.write(triples, tmp_path / "out.json", folder)
    back = povid.read(tmp_path / "out.json", folder)
    assert [(t.id, t.preferred, t.dispreferred) for t in back] == [(t.id, t.preferred, t.dispreferred) for t in triples]
    assert [t.image.read_bytes() for t in back] == [t.image for t in triples]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "pictures"]


def test_a_picture_of_coco_is_found_under_any_years_name(tmp_path):
    for there in ("COCO_train2014_000000000001.jpg", "COCO_val2014_000000000001.jpg", "000000000001.jpg"):
        images = tmp_path / there.removesuffix(".jpg")
        images.mkdir()
        (images / there).write_bytes(encoded(kind="JPEG"))
        for asked in ("000000000001.jpg", "coco/train2017/000000000001.jpg", "./a/COCO_train2014_000000000001.jpg"):
            (triple,) = povid.read(stored(tmp_path, [record(image=asked)]), images)
            assert triple.image == images / there, asked


def test_a_full_disk_is_one_sentence_and_leaves_no_file(tmp_path, images, monkeypatch, capsys):
    data = stored(tmp_path, [record()])
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for format in ("povid", "trl"):
        out = tmp_path / f"out.{format}"
        assert main(["convert", str(data), "--images", str(images), "--to", format, "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out}: No space left on device; free space or choose another place\n"
        assert sorted(tmp_path.iterdir()) == before


# --- the other formats ---


def completion(response: str, *ratings) -> dict:
    names = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {
        "model": "m",
        "response": response,
        "annotations": {name: {"Rating": rating, "Rationale": "r"} for name, rating in zip(names, ratings)},
    }


def test_vlfeedback_makes_every_pair_but_ties_and_unrated(tmp_path, images):
    """Means: A (4+5+5)/3 = 4.67, B (3+5+5)/3 = 4.33, C (5+4+5)/3 = 4.67, D has "N/A".

    Pairs: A-B (A preferred), A-C tie, B-C (C preferred), every pair with D unrated: two pairs.
    """
    row = {
        "id": "x-1",
        "prompt": "What is shown?",
        "img_path": "merged_images/COCO_train2014_000000000001.png",
        "models": ["m"] * 4,
        "completions": [
            completion("A.", "4", "5", "5"),
            completion("B.", "3", "5", "5"),
            completion("C.", "5", "4", "5"),
            completion("D.", "N/A", "5", "5"),
        ],
    }
    expected = [("x-1-0-1", "A.", "B."), ("x-1-1-2", "C.", "B.")]
    triples = vlfeedback.read(stored(tmp_path, [row], "v.jsonl"), images)
    assert [(t.id, t.preferred[-1].text, t.dispreferred[-1].text) for t in triples] == expected

    columns = {key: [entry[key] for entry in row["completions"]] for key in ("model", "response", "annotations")}
    triples = vlfeedback.read(stored(tmp_path, [row | {"completions": columns}]), images)
    assert [(t.id, t.preferred[-1].text, t.dispreferred[-1].text) for t in triples] == expected


def test_vlfeedback_leaves_out_pairs_that_teach_nothing(tmp_path, images):
    row = {
        "id": 7,
        "prompt": "?",
        "img_path": "COCO_train2014_000000000001.png",
        "completions": [
            completion("Same.", "5", "5", "5"),
            completion("Same.", "1", "1", "1"),
            completion("", "2", "2", "2"),
            completion("nan", "NaN", "2", "2"),
        ],
    }
    assert vlfeedback.read(stored(tmp_path, [row], "v.jsonl"), images) == []


def test_human_preference_replaces_the_last_turn(tmp_path, images):
    for preference, good, bad in ((1, "A cat.", "A dog."), (2, "A dog.", "A cat.")):
        row = {
            "id": "1",
            "image": "COCO_train2014_000000000001.png",
            "preference": preference,
            "conversations": talk("<image>\nHello", "Hi.", "What is this?", ""),
            "output_1": {"from": "gpt", "value": "A cat."},
            "output_2": {"from": "gpt", "value": "A dog."},
        }
        (triple,) = human_preference.read(stored(tmp_path, [row]), images)
        assert [turn.text for turn in triple.preferred] == ["Hello", "Hi.", "What is this?", good]
        assert [turn.text for turn in triple.dispreferred] == ["Hello", "Hi.", "What is this?", bad]


FIELDS = {"question": "Describe it.", "chosen": "A cup.", "rejected": "A cup and a plate."}


def test_rlhf_v_text_in_each_packing(tmp_path, images):
    listed = json.dumps(list(FIELDS.values()))
    for packed in (json.dumps(FIELDS), listed, base64.b64encode(listed.encode()).decode(), FIELDS):
        row = {"ds_name": "RLHF-V", "text": packed, "idx": 0, "image_path": "a/COCO_train2014_000000000001.png"}
        (triple,) = rlhf_v.read(stored(tmp_path, [row], "r.jsonl"), images)
        assert (triple.id, triple.question, triple.meta) == ("0", "Describe it.", {"ds_name": "RLHF-V"})
        assert (triple.preferred[-1].text, triple.dispreferred[-1].text) == ("A cup.", "A cup and a plate.")


def test_rlhf_v_parquet_with_pictures_inside(tmp_path):
    for image in (encoded(), {"bytes": encoded(), "path": "a.png"}):
        rows = [{"image": image, "text": json.dumps(FIELDS), "idx": n, "image_path": "a.png"} for n in range(70)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
        triples = rlhf_v.read(tmp_path / "r.parquet")
        assert [t.id for t in triples] == [str(n) for n in range(70)]
        assert picture_bytes(triples[69].image) == encoded()


def test_rlaif_v_reads_a_folder_of_shards_in_order(tmp_path):
    for shard in (1, 0):
        rows = [
            {
                "ds_name": "RLAIF-V",
                "image": {"bytes": encoded(), "path": None},
                "idx": str(shard),
                "origin_split": "{}",
                "image_path": "",
            }
            | FIELDS
        ]
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"RLAIF-V-Dataset_00{shard}.parquet")
    assert [t.id for t in rlaif_v.read(tmp_path)] == ["0", "1"]


def test_pictures_in_base64(tmp_path):
    in_base64 = base64.b64encode(encoded()).decode()
    for image in (in_base64, "data:image/png;base64," + in_base64):
        (triple,) = rlaif_v.read(stored(tmp_path, [{"image": image, "idx": 1} | FIELDS], "r.jsonl"))
        assert picture_bytes(triple.image) == encoded()


def test_trl_reads_text_content_and_content_in_parts(tmp_path, images):
    said = {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "A bus."}],
        "rejected": [{"role": "assistant", "content": "A tram."}],
        "images": ["COCO_train2014_000000000001.png"],
    }
    parts = copy.deepcopy(said)
    parts["prompt"][0]["content"] = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    implicit = {"images": said["images"]} | {key: said["prompt"] + said[key] for key in ("chosen", "rejected")}
    rows = trl.read(stored(tmp_path, [said, parts, implicit]), images)
    assert [row.preferred for row in rows] == [(Turn("user", "What?"), Turn("assistant", "A bus."))] * 3
    assert [row.id for row in rows] == ["0", "1", "2"]


def several_turns(image) -> Triple:
    start = (Turn("user", "What?"), Turn("assistant", "A bus."), Turn("user", "Colour?"))
    return Triple("m", image, (*start, Turn("assistant", "Red.")), (*start, Turn("assistant", "Blue.")), "trl")


def test_trl_conversion_is_exact_both_ways(images):
    triple = several_turns(images / "COCO_train2014_000000000001.png")
    row = trl.to_row(triple)
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert trl.from_row(row, images) == triple


def test_trl_conversion_when_the_first_of_several_answers_differs(images):
    triple = Triple(
        "m",
        images / "COCO_train2014_000000000001.png",
        (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")),
        (Turn("user", "a"), Turn("assistant", "x"), Turn("user", "c"), Turn("assistant", "y")),
        "trl",
    )
    assert [len(trl.to_row(triple)[key]) for key in ("prompt", "chosen", "rejected")] == [1, 3, 3]
    assert trl.from_row(trl.to_row(triple), images) == triple


def test_trl_parquet_carries_its_pictures_and_the_datasets_library_reads_it(tmp_path, images):
    path = images / "COCO_train2014_000000000001.png"
    trl.write([several_turns(path), several_turns(encoded("blue"))], tmp_path / "t.parquet")
    back = trl.read(tmp_path / "t.parquet")
    assert [picture_bytes(t.image) for t in back] == [path.read_bytes(), encoded("blue")]
    assert back[0].preferred == several_turns(path).preferred
    import datasets  # takes a second

    rows = datasets.Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows[0]["images"][0].size == (8, 6)


# --- several pictures, or none ---


@pytest.mark.parametrize("format", [povid, trl])
def test_records_of_several_pictures_or_none_there_and_back(tmp_path, images, format):
    one = images / "COCO_train2014_000000000001.png"
    triples = [replace(several_turns(one), id="two", image=(one, encoded("blue")))]
    triples += [replace(several_turns(one), id="none", image=None), replace(several_turns(one), id="one", image=(one,))]
    assert [len(triple.pictures) for triple in triples] == [2, 0, 1] and triples[2].image == one
    file = tmp_path / ("out.json" if format is povid else "out.parquet")
    format.write(triples, file, images)
    back = format.read(file, images)
    assert [(t.id, t.preferred, t.dispreferred) for t in back] == [(t.id, t.preferred, t.dispreferred) for t in triples]
    shown = [[*map(picture_bytes, triple.pictures)] for triple in back]
    assert shown == [[one.read_bytes(), encoded("blue")], [], [one.read_bytes()]]
    if format is povid:
        first = json.loads(file.read_text())[0]
        assert first["image"] == [one.name, "two_1.png"]
        assert first["conversations"][0]["value"].startswith("<image>\n<image>\n")


def test_trl_counts_the_places_of_several_pictures(images):
    row = trl.to_row(several_turns(images / "COCO_train2014_000000000001.png"))
    del row["prompt"][0]["content"][0]  # no place is marked: the pictures come first
    row["images"] *= 2
    assert len(trl.from_row(row, images).pictures) == 2
    row["prompt"][0]["content"] = "<image> or <image> or <image>?"
    with pytest.raises(Fault, match="pictures in images: 2, markers <image> in its questions: 3"):
        trl.from_row(row, images)


# --- what is refused, and how ---


def refusal(path: Path, images: Path | None, format: str = "povid") -> str:
    with pytest.raises(Fault) as caught:
        formats.find(format)(path, images)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 1200, sentence
    return sentence


DAMAGED_RECORDS = [
    ({"image": "../../etc/passwd"}, "leads out of the image folder"),
    ({"image": "/etc/passwd"}, "leads out of the image folder"),
    ({"image": "C:\\pictures\\a.png"}, "leads out of the image folder"),
    ({"image": "a\x00.png"}, "NUL"),
    ({"image": "a" * 5000}, "5,000 characters"),
    ({"image": "a" * 600}, "1 picture is not in"),
    ({"image": 5}, "image must be text, found a number 5"),
    ({"image": ["a.png", "b.png"]}, "pictures in image: 2, markers <image> in its questions: 1; list every picture"),
    ({"image": []}, "pictures in image: 0, markers <image> in its questions: 1; list every picture"),
    ({"conversations": "hello"}, "conversations must be a list"),
    ({"conversations": []}, "conversations must be a list with entries, found an empty list"),
    ({"conversations": talk("<image>", "A bus.")}, "is empty apart from the image marker"),
    ({"conversations": talk("<image>\nWhat?", " ")}, "conversations[1].value is empty"),
    ({"conversations": talk("<image>\nWhat?", "\ud800 bus")}, "half a surrogate pair"),
    ({"conversations": talk("<image>\nWhat?", "bus " * 30_000)}, "120,000 characters"),
    ({"conversations": [{"from": "system", "value": "x"}]}, "conversations[0].from must be 'human' or 'gpt'"),
    (
        {"conversations": talk("<image>\nDescribe this image.", "A.", "More?", "B.")},
        "has 4 turns and dispreferred 2",
    ),
    ({"conversations": talk("<image>\nWhat else?", "A.")}, "user turn 0 differs"),
    ({"rejected_conversations": record()["conversations"]}, "are equal"),
    ({"rejected_conversations": None}, "key 'rejected_conversations' is missing"),
    ({"id": {"a": 1}}, "id must be text, found an object"),
    ({"id": "a" * 301}, "301 characters"),
]


def test_a_damaged_povid_record_is_refused_by_place_record_and_key(tmp_path, images):
    for changes, expected in DAMAGED_RECORDS:
        path = stored(tmp_path, [record(2), record(1, **changes)])
        sentence = refusal(path, images)
        assert expected in sentence
        if "is not in" not in sentence:
            assert sentence.startswith(f"{path}, entry 1: record ")


DAMAGED_FILES = [
    (b"", "not valid JSON"),
    (b"[]", "holds no records"),
    (b"{}", "must be a JSON list of records, found an object"),
    (b"[1]", "entry 0: record: the record must be an object, found a number 1"),
    (b'[{"id": "a"', "not valid JSON (Expecting"),
    (b'{"id": 1}\n{"id": 2}', "one record per line, name it .jsonl"),
    (b'["\xff"]', "not UTF-8 (0xff at byte 2)"),
    (b"[" * 100_000, "nests lists or objects too deeply"),
    (b'[{"id": NaN}]', "a number that JSON does not allow (NaN)"),
    (b'[{"id": ' + b"9" * 5000 + b"}]", "a number that JSON does not allow"),
]


def test_a_damaged_file_is_refused(tmp_path, images):
    for content, expected in DAMAGED_FILES:
        (tmp_path / "data.json").write_bytes(content)
        assert expected in refusal(tmp_path / "data.json", images), content[:40]


def test_deep_nesting_below_the_parsers_limit_is_refused_too(tmp_path, images):
    depth = 500
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record()]).replace('"A red bus on a street."', "[" * depth + "]" * depth))
    assert "conversations[1].value must be text, found a list" in refusal(path, images)


def test_missing_pictures_are_counted_in_one_sentence(tmp_path, images):
    path = stored(tmp_path, [record(n) for n in range(1, 8)])
    sentence = refusal(path, images)
    assert "5 pictures are not in" in sentence and "000000000003.png" in sentence and "000000000006" not in sentence


def test_a_link_out_of_the_folder_is_refused_and_a_linked_folder_is_not(tmp_path, images):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded())
    (images / "link.png").symlink_to(secret)
    assert "a link that leads out" in refusal(stored(tmp_path, [record(image="link.png")]), images)
    (tmp_path / "linked").symlink_to(images, target_is_directory=True)
    assert len(povid.read(stored(tmp_path, [record()]), tmp_path / "linked")) == 1


def test_unknown_format_kind_folder_and_file(tmp_path, images):
    path = stored(tmp_path, [record()])
    for name, function, expected in (
        ("rlhfv", "read", "did you mean 'rlhf_v'?"),
        ("json", "read", "has no function 'read'"),
        ("no.such.module", "read", "cannot be found (No module named"),
        ("rlhf_v", "write", "has no function 'write'"),
    ):
        with pytest.raises(Fault, match=re.escape(expected)):
            formats.find(name, function)
    assert "image folder" in refusal(path, tmp_path / "nowhere")
    assert "does not exist" in refusal(tmp_path / "absent.json", images)
    assert "no image folder was given" in refusal(path, None)
    (tmp_path / "a.txt").write_text("x")
    assert "ends in '.txt'" in refusal(tmp_path / "a.txt", images)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert "not a valid parquet file" in refusal(tmp_path / "a.parquet", images)
    assert "without .parquet files" in refusal(images, images)


def test_skipping_is_explicit_and_counts(tmp_path, images):
    lines = [
        json.dumps(record(1)),
        "{half",
        json.dumps(record(3)),
        json.dumps(record(2, id=None)),
        json.dumps(record(2)),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    skipped: list[str] = []
    triples = povid.read(path, images, skipped)
    assert [t.id[-1] for t in triples] == ["1", "2"]
    assert [sentence.partition(", line ")[2][:1] for sentence in skipped] == ["2", "3", "4"]


DAMAGED_OTHERS = [
    (
        "vlfeedback",
        {"id": "1", "prompt": "?", "img_path": PICTURE, "completions": 3},
        "completions must be a list",
    ),
    (
        "vlfeedback",
        {
            "id": "1",
            "prompt": "?",
            "img_path": PICTURE,
            "completions": [{"response": "a", "annotations": {}}],
        },
        "key 'Helpfulness' is missing",
    ),
    (
        "vlfeedback",
        {
            "id": "1",
            "prompt": "?",
            "img_path": PICTURE,
            "completions": {"response": ["a"], "annotations": [{}, {}]},
        },
        "differ in length",
    ),
    (
        "human_preference",
        {
            "id": "1",
            "image": PICTURE,
            "preference": 0,
            "conversations": talk("?", "x"),
            "output_1": {"value": "a"},
            "output_2": {"value": "b"},
        },
        "preference must be 1 or 2, found 0",
    ),
    (
        "human_preference",
        {
            "id": "1",
            "image": PICTURE,
            "preference": True,
            "conversations": talk("?", "x"),
        },
        "preference must be 1 or 2, found True",
    ),
    (
        "human_preference",
        {"id": "1", "image": PICTURE, "preference": 1, "conversations": talk("?")},
        "must end with the gpt turn",
    ),
    ("rlhf_v", {"idx": 1, "text": "{half", "image_path": PICTURE}, "text is not JSON"),
    ("rlhf_v", {"idx": 1, "text": "[" * 9000, "image_path": "a"}, "text is not JSON"),
    ("rlhf_v", {"idx": 1, "text": "{}", "image_path": "a"}, "key 'question' is missing in text"),
    ("rlaif_v", {"idx": 1, "question": "?", "chosen": "a", "image": b"".hex()}, "key 'rejected' is missing"),
    (
        "trl",
        {
            "images": [PICTURE],
            "prompt": [{"role": "system", "content": "x"}],
            "chosen": [],
            "rejected": [],
        },
        "prompt[0].role must be 'user' or 'assistant'",
    ),
    ("trl", {"images": [], "prompt": "?"}, "prompt must be a list"),
]


def test_damaged_records_of_the_other_formats(tmp_path, images):
    for format, row, expected in DAMAGED_OTHERS:
        sentence = refusal(stored(tmp_path, [row]), images, format)
        assert expected in sentence and "entry 0: record" in sentence


def test_a_format_of_ones_own_works_like_ours(tmp_path, images, monkeypatch, capsys):
    (tmp_path / "my_format.py").write_text(
        "from povid.preferences.formats import povid\n"
        "def read(preferences, images=None, skipped=None):\n"
        "    return povid.read(preferences, images, skipped)[:1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = stored(tmp_path, [record(1), record(2)])
    for name in ("my_format", "my_format.read"):
        assert main(["check", str(path), "--images", str(images), "--format", name]) == 0
        assert capsys.readouterr().out == "1 of 1 records checked: no problems\n"


# --- the fuzz: nothing that a file may hold makes a reader crash or hang ---

RUBBISH = [
    None,
    True,
    0,
    -1,
    1e308,
    10**40,
    "",
    " ",
    "\x00",
    "\ud800",
    "<image>",
    "../../x",
    "/etc/passwd",
    "a" * 200_000,
    [],
    {},
    [[]],
    {"": {}},
    [None] * 1000,
    [{"from": "human"}],
    {"bytes": "x", "path": 3},
    "💥\u202e",
    "1e999",
]


def variants(count: int, seed: int):
    """Yield (name, bytes): a good file of six records, each time damaged in another way."""
    rng = random.Random(seed)
    good = [record(rng.choice((1, 2)), id=f"r{n}") for n in range(6)]
    for number in range(count):
        rows = copy.deepcopy(good)
        kind = number % 10
        if kind == 9:  # keys that nobody asked for are no damage
            rows[number % 6]["extra"] = rows[0]["conversations"][0]["weight"] = rng.choice(RUBBISH)
        elif kind < 4:  # a value anywhere in the tree is replaced or removed
            spots = [spot for row in rows for spot in _spots(row)] + [(rows, n) for n in range(len(rows))]
            for _ in range(rng.choice((1, 1, 3))):
                holder, key = rng.choice(spots)
                if rng.random() < 0.3 and isinstance(holder, dict):
                    holder.pop(key, None)
                else:
                    holder[key] = copy.deepcopy(rng.choice(RUBBISH))
            yield "data.json", json.dumps(rows, allow_nan=True).encode()
            continue
        raw = bytearray(json.dumps(rows).encode())
        if kind == 9:
            pass
        elif kind == 4:
            del raw[rng.randrange(len(raw)) :]
        elif kind == 5:
            for _ in range(rng.choice((1, 5, 50))):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        elif kind == 6:
            at = rng.randrange(len(raw))
            raw[at:at] = rng.choice((b"[" * 50_000, b"NaN", b"\xff\xfe", b"\x00", b'"', b"," * 99, b"9" * 6000))
        elif kind == 7:
            raw = bytearray(
                rng.choice(
                    (
                        b"",
                        b"null",
                        b"3",
                        b'"x"',
                        b"{}",
                        b"[[]]",
                        b"[null]",
                        b"[[[",
                        b"\xef\xbb\xbf[]",
                        raw.decode().encode("utf-16"),
                        bytes(rng.randbytes(500)),
                    )
                )
            )
        else:
            lines = [json.dumps(row).encode() for row in rows]
            lines[rng.randrange(6)] = rng.choice((b"{", b"\xff", b"null", b"[" * 9999, b"{}", lines[0] * 2))
            yield "data.jsonl", b"\n".join(lines)
            continue
        yield "data.json", bytes(raw)


def _spots(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _spots(inner)


def test_fuzz_450_damaged_files_are_refused_in_one_sentence_or_read_right(tmp_path, images):
    refused, readable = 0, 0
    for name, content in variants(450, seed=5):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            triples = povid.read(path, images)
        except Fault as fault:
            sentence = str(fault)
            assert "\n" not in sentence and len(sentence) < 1200 and str(path) in sentence, sentence
            sentence.encode("utf-8")
            refused += 1
        else:
            readable += 1
            assert len(triples) == 6 and all(os.path.dirname(t.image) == str(images) for t in triples)
        skipped: list[str] = []
        try:
            kept = povid.read(path, images, skipped)
        except Fault:
            assert not skipped
        else:
            assert len(kept) + len(skipped) >= 1
    assert refused > 300 and readable >= 45


GOOD = {
    "vlfeedback": {
        "id": "x",
        "prompt": "What?",
        "img_path": PICTURE,
        "models": ["m"] * 3,
        "completions": [
            completion("A.", "4", "5", "5"),
            completion("B.", "3", "5", "5"),
            completion("C.", "N/A", "4", "5"),
        ],
    },
    "human_preference": {
        "id": "1",
        "image": PICTURE,
        "preference": 2,
        "conversations": talk("<image>\nWhat?", "x"),
        "output_1": {"from": "gpt", "value": "A."},
        "output_2": {"from": "gpt", "value": "B."},
    },
    "rlhf_v": {"ds_name": "RLHF-V", "idx": 3, "image_path": PICTURE, "origin_split": "{}", "text": FIELDS},
    "rlaif_v": {"ds_name": "RLAIF-V", "idx": 3, "image": PICTURE, "origin_split": "{}"} | FIELDS,
    "trl": {
        "id": "a",
        "images": [{"bytes": None, "path": PICTURE}],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}],
        "chosen": [{"role": "assistant", "content": "A."}],
        "rejected": [{"role": "assistant", "content": "B."}],
    },
}


def test_fuzz_150_damaged_records_of_every_other_format(tmp_path, images):
    for format in GOOD:
        fuzz_records(tmp_path, images, format)


def fuzz_records(tmp_path: Path, images: Path, format: str) -> None:
    rng, refused = random.Random(11), 0
    path = tmp_path / "data.json"
    assert len(formats.find(format)(stored(tmp_path, [GOOD[format]]), images)) == 1
    for _ in range(150):
        row = copy.deepcopy(GOOD[format])
        for _ in range(rng.choice((1, 1, 2))):
            holder, key = rng.choice(list(_spots(row)))
            if isinstance(holder, dict) and rng.random() < 0.3:
                holder.pop(key, None)
            elif isinstance(holder, dict) or key < len(holder):
                holder[key] = copy.deepcopy(rng.choice(RUBBISH))
        path.write_text(json.dumps([row]))
        try:
            triples = formats.find(format)(path, images)
        except Fault as fault:
            sentence = str(fault)
            assert "\n" not in sentence and len(sentence) < 1200 and str(path) in sentence, sentence
            sentence.encode("utf-8")
            refused += 1
        else:
            for triple in triples:
                assert all(isinstance(turn.text, str) for turn in triple.preferred + triple.dispreferred)
                assert isinstance(triple.image, bytes) or triple.image.parent == images
    assert 30 < refused < 150
