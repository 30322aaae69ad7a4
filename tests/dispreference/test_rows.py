"""What a run is given: LLaVA-Instruct records and rows of image, question and answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from povid.dispreference.rows import read_rows
from povid.fault import Fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "000000000042.jpg")
    return tmp_path


def stored(folder: Path, value, name: str = "rows.json") -> Path:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder / name


INSTRUCT = {
    "id": "000000000042",
    "image": "coco/train2017/000000000042.jpg",
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Describe it."},
        {"from": "gpt", "value": "It is red."},
    ],
}


def test_llava_instruct_by_first_question_or_by_each(folder):
    file = stored(folder, [INSTRUCT])
    (row,) = read_rows(file, folder)
    assert (row.id, row.question, row.answer, row.kind) == ("000000000042", "What is it?", "A bus.", "reasoning")
    assert row.image == folder / "000000000042.jpg"
    first, second = read_rows(file, folder, questions="each")
    assert (first.id, second.id, second.kind) == ("000000000042-0", "000000000042-1", "captioning")
    triple = second.triple("It is red.", "It is blue.")
    assert [turn.text for turn in triple.dispreferred] == ["What is it?", "A bus.", "Describe it.", "It is blue."]


def test_plain_rows_as_json_lines_and_csv(folder):
    lines = '{"image": "000000000042.jpg", "question": "<image>\\nWhat?", "answer": "A, bus", "prompt": "captioning"}'
    table = 'image,question,answer,prompt\n000000000042.jpg,What?,"A, bus",captioning\n'
    (one,) = read_rows(stored(folder, lines, "rows.jsonl"), folder)
    (two,) = read_rows(stored(folder, table, "rows.csv"), folder)
    for row in (one, two):
        assert (row.question, row.answer, row.kind) == ("What?", "A, bus", "captioning")


def test_the_prompt_can_be_set_for_all_and_by_record(folder):
    rows = [{"id": n, "image": "000000000042.jpg", "question": "Describe it.", "answer": "a"} for n in (1, 2)]
    rows[1]["prompt"] = "captioning"
    assert [row.kind for row in read_rows(stored(folder, rows), folder)] == ["captioning"] * 2
    reasoned = read_rows(stored(folder, rows), folder, kind="reasoning")
    assert [row.kind for row in reasoned] == ["reasoning", "captioning"]


UNUSABLE = [
    ({"image": "000000000042.jpg", "question": "What?"}, "entry 0: record 0: key 'answer' is missing"),
    ({"image": "000000000042.jpg", "question": "What?", "answer": " "}, "answer is empty"),
    ({"image": "000000000042.jpg", "question": "<image>", "answer": "a"}, "question is empty"),
    ({"question": "What?", "answer": "a"}, "key 'image' is missing"),
    ({"image": "../x.jpg", "question": "What?", "answer": "a"}, "leads out of the image folder"),
    ({"image": "gone.jpg", "question": "What?", "answer": "a"}, "1 picture is not in"),
    ({"image": "000000000042.jpg", "question": "W?", "answer": "a", "prompt": "x"}, "prompt must be captioning or"),
    (INSTRUCT | {"conversations": INSTRUCT["conversations"][:3]}, "end with gpt"),
    (7, "must be an object"),
]


def test_a_row_that_cannot_be_used_is_named_or_skipped(folder):
    good = {"image": "000000000042.jpg", "question": "What?", "answer": "a"}
    for row, expected in UNUSABLE:
        file = stored(folder, [row, good])
        with pytest.raises(Fault, match=expected.replace("'", ".")):
            read_rows(file, folder)
        skipped: list[str] = []
        assert len(read_rows(file, folder, skipped=skipped)) == 1 and len(skipped) == 1


def test_a_file_that_is_no_csv_table(folder):
    with pytest.raises(Fault, match="not a CSV table"):
        read_rows(stored(folder, 'image,question\n"a,b', "rows.csv"), folder)
