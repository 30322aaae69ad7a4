"""Pictures that stay inside the file that holds their records."""

from __future__ import annotations

import base64
import codecs
import json
import multiprocessing
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from povid import files
from povid.fault import Fault
from povid.preferences import records
from povid.preferences.formats import povid, rlaif_v, trl
from povid.preferences.held_out import hold_out
from povid.preferences.pictures import picture_digests
from povid.preferences.stored import Stored, cache, picture_bytes

JPEG = b"\xff\xd8\xff"
FIELDS = {"question": "What is it?", "chosen": "A red bus.", "rejected": "A blue bus."}


def pictures(count: int, size: int = 300) -> list[bytes]:
    return [JPEG + random.Random(number).randbytes(size) for number in range(count)]


def write(rows: list[dict], file: Path, schema: pyarrow.Schema | None = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, row_group_size=50)
    return file


def whole(value):
    """A record with the pictures in it read."""
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return value.read() if isinstance(value, Stored) else value


def copies(stem: str) -> list[str]:
    return sorted(file.name for file in cache().glob(f"{stem}-*.arrow"))


def test_every_value_of_a_parquet_file_is_as_arrow_has_it(tmp_path):
    part = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.string())])
    kinds = {
        "id": pyarrow.int64(),
        "plain": pyarrow.binary(),
        "one": part,
        "several": pyarrow.list_(part),
        "words": pyarrow.list_(pyarrow.string()),
        "kind": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    rows = [
        {
            "id": number if number % 3 else None,
            "plain": [None, b"", picture][number % 3],
            "one": None if number % 5 == 0 else {"bytes": picture if number % 2 else None, "path": f"{number}.jpg"},
            "several": [None, [], [None, {"bytes": picture, "path": None}], [{"bytes": b"", "path": "é"}] * 2][
                number % 4
            ],
            "words": [["é", None], None][number % 2],
            "kind": "ab"[number % 2],
        }
        for number, picture in enumerate(pictures(130))
    ]
    file = write(rows, tmp_path / "kinds.parquet", pyarrow.schema(list(kinds.items())))
    found = list(records.records(file))
    assert [place for place, _ in found] == [f"{file}, row {number}" for number in range(130)]
    assert [whole(record) for _, record in found] == pyarrow.parquet.read_table(file).to_pylist()
    assert isinstance(found[2][1]["plain"], Stored) and found[1][1]["plain"] == b""


def test_a_copy_is_made_once_and_again_when_the_file_was_changed(tmp_path, monkeypatch):
    file = write([{"idx": n, "image": p} | FIELDS for n, p in enumerate(pictures(3))], tmp_path / "once.parquet")
    (copy,) = {triple.image.source.path for triple in rlaif_v.read(file)}
    made = Path(copy).stat()
    first = rlaif_v.read(file)
    assert Path(copy).stat() == made and copies("once") == [Path(copy).name]
    changed = pictures(4)[::-1]
    write([{"idx": n, "image": p} | FIELDS for n, p in enumerate(changed)], file)
    assert [picture_bytes(triple.image) for triple in rlaif_v.read(file)] == changed
    assert len(copies("once")) == 1 and copies("once") != [Path(copy).name], "the old copy is removed"
    with pytest.raises(Fault, match="was changed or removed"):
        first[0].image.read()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "taken"))
    (tmp_path / "taken").write_text("a file in the place of the folder")
    with pytest.raises(Fault, match="cannot be copied to .*name another folder in HF_DATASETS_CACHE"):
        rlaif_v.read(file)


def test_digests_are_those_of_the_bytes_and_are_kept(tmp_path, monkeypatch):
    known = pictures(6)
    write([{"idx": n, "image": known[n // 2]} | FIELDS for n in range(12)], tmp_path / "digests.parquet")
    stored = rlaif_v.read(tmp_path / "digests.parquet")
    monkeypatch.setattr(Stored, "read", None)  # they were taken when the copy was made
    found = picture_digests([triple.image for triple in stored], files.digest)
    assert found == [files.digest(known[n // 2]) for n in range(12)]
    kept, held = hold_out(stored, 0.34)
    assert len(held) == 4 and len({triple.id for triple in kept} | {triple.id for triple in held}) == 12


def test_a_bad_record_of_a_shard_is_named_as_ever(tmp_path):
    rows = [{"idx": n, "image": p} | FIELDS for n, p in enumerate(pictures(4))]
    write(rows, tmp_path / "a.parquet")
    write([*rows[:2], rows[2] | {"chosen": " "}, rows[3] | {"image": b""}], tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(Fault) as caught:
        rlaif_v.read(tmp_path)
    said = f"{tmp_path}/b.parquet, row 2: record 2: chosen is empty; fill it in or remove the record"
    assert str(caught.value) == said
    (tmp_path / "c.parquet").unlink()
    skipped: list[str] = []
    assert len(rlaif_v.read(tmp_path, skipped=skipped)) == 6
    assert skipped[0] == said and "row 3: record 3: key 'image_path' is missing" in skipped[1]


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
def test_a_json_list_is_read_entry_by_entry(tmp_path, monkeypatch, start):
    monkeypatch.setattr(records, "BLOCK", 7)
    rows = [{"é": "💥" * (number % 5), "n": [number, -1.5e3, None, True, {"x": '\\"]'}]} for number in range(40)]
    entries = [*rows, 12, "text", [], {}, None, 345678]
    for indent in (None, 1):
        (tmp_path / "a.json").write_bytes(
            start + json.dumps(entries, ensure_ascii=False, indent=indent).encode() + b" \n"
        )
        assert [record for _, record in records.records(tmp_path / "a.json")] == entries
    for wrong in (b"[1, 2", b"[1, 2,]", b"[1 2]", b"[1] 2", b'[1, {"a": }]', b"[1, \xff]", b"[NaN]"):
        (tmp_path / "a.json").write_bytes(start + wrong)
        with pytest.raises(Fault, match=r"a\.json (is not valid JSON|is not UTF-8|holds a number)"):
            list(records.records(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_pictures_in_json_stay_there(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "BLOCK", 50)
    known = pictures(5)
    rows = [
        {"idx": n, "image": ("data:image/jpeg;base64," if n % 2 else "") + base64.b64encode(picture).decode()} | FIELDS
        for n, picture in enumerate(known)
    ]
    rows[2]["question"] = "Was für ein 🚌 ist das?"
    rows[3]["image"] = {"bytes": rows[3]["image"], "path": "é.jpg"}
    lines = [json.dumps(row, ensure_ascii=False).replace("/", "\\/") for row in rows]  # as some writers escape it
    text = "\n\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    found = rlaif_v.read(tmp_path / name)
    assert all(isinstance(triple.image, Stored) for triple in found)
    assert [picture_bytes(triple.image) for triple in found] == known
    assert picture_digests([triple.image for triple in found], files.digest) == [files.digest(p) for p in known]
    files.write_text(tmp_path / name, text[:-30])
    again = rlaif_v.read(tmp_path / name, skipped=[]) if name.endswith("l") else []
    assert [picture_bytes(triple.image) for triple in again] == known[: len(again)], "not read from the old file"


def test_stored_pictures_are_written_in_both_formats(tmp_path):
    known = pictures(2)
    write([{"idx": n, "image": p} | FIELDS for n, p in enumerate(known)], tmp_path / "from.parquet")
    triples = rlaif_v.read(tmp_path / "from.parquet")
    trl.write(triples, tmp_path / "to.parquet")
    assert [picture_bytes(triple.image) for triple in trl.read(tmp_path / "to.parquet")] == known
    povid.write(triples, tmp_path / "to" / "data.json", tmp_path / "to")
    assert [triple.image.read_bytes() for triple in povid.read(tmp_path / "to" / "data.json", tmp_path / "to")] == known


def test_a_data_set_of_the_hub_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder for the data set of this name, without a network
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    known = pictures(70)
    for shard in range(2):
        rows = [
            {"idx": n, "image": {"bytes": known[n], "path": None}} | FIELDS for n in range(35 * shard, 35 * (shard + 1))
        ]
        write(rows, tmp_path / "owner" / "name" / f"train-{shard}.parquet")
    for name in (Path("hf://datasets/owner/name"), "hf://datasets/owner/name"):
        found = rlaif_v.read(name, tmp_path / "no such folder")
        assert [triple.id for triple in found] == [str(number) for number in range(70)]
        assert [place for place, _ in records.records(name)][69] == "hf://datasets/owner/name, row 69"
        assert [picture_bytes(triple.image) for triple in found] == known
    assert all(file.suffix == ".arrow" for file in records.sources("hf://datasets/owner/name"))
    with pytest.raises(Fault, match=r"hf://datasets/owner/none cannot be loaded .* check the name"):
        rlaif_v.read(Path("hf://datasets/owner/none"))


def test_reading_keeps_the_pictures_out_of_memory(tmp_path):
    """Of 40 MB of pictures in one row group, reading records and pictures keeps less than a quarter in memory."""
    noise = random.Random(0).randbytes(2**20)
    rows = [{"idx": n, "image": JPEG + n.to_bytes(4, "big") + noise} | FIELDS for n in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "large.parquet")
    del rows

    def resident() -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))

    def work() -> None:
        rlaif_v.read(write([{"idx": 0, "image": JPEG * 9} | FIELDS], tmp_path / "small.parquet"))  # its imports
        before = resident()
        triples = rlaif_v.read(tmp_path / "large.parquet")
        sizes = {len(triple.image.read()) for triple in triples}
        os._exit(0 if sizes == {2**20 + 7} and resident() - before < 10 else 1)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0
