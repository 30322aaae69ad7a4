"""The data check and its command."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from povid.preferences.__main__ import main
from povid.preferences.check import check
from povid.preferences.formats import povid
from povid.preferences.pictures import picture_fault
from povid.preferences.triple import Triple, Turn


def triple(
    image: Path | bytes | tuple | None, id: str = "a", good: str = "A red bus.", bad: str = "A blue bus."
) -> Triple:
    asked = Turn("user", "What is it?")
    return Triple(id, image, (asked, Turn("assistant", good)), (asked, Turn("assistant", bad)))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "sound.png")
    return tmp_path / "sound.png"


def bomb(path: Path) -> Path:
    """A PNG of 60 bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_sound_pictures_of_every_kind_pass(tmp_path, sound):
    assert picture_fault(sound) is None
    assert picture_fault(sound.read_bytes()) is None
    for mode, name in (("RGBA", "a.png"), ("L", "g.png"), ("P", "p.gif"), ("CMYK", "c.jpg"), ("1", "b.bmp")):
        Image.new(mode, (9, 7)).save(tmp_path / name)
        assert picture_fault(tmp_path / name) is None, name


def test_each_problem_of_a_picture_is_named(tmp_path, sound):
    (tmp_path / "cut.png").write_bytes(sound.read_bytes()[:-900])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    assert "cannot be decoded" in picture_fault(tmp_path / "cut.png")
    assert "cannot be decoded" in picture_fault(tmp_path / "text.jpg")
    assert "cannot be decoded" in picture_fault(tmp_path / "empty.jpg")
    assert "does not exist" in picture_fault(tmp_path / "none.jpg")
    assert "does not exist" in picture_fault(tmp_path)
    assert "too many" in picture_fault(bomb(tmp_path / "bomb.png"))
    assert "cannot be decoded" in picture_fault(b"\xff\xd8\xff\xe0 no more")


def test_a_picture_just_beyond_the_limit_is_not_decoded(tmp_path, monkeypatch):
    """48 x 64 = 3072 pixels against a limit of 3000."""
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert "48 x 64 pixels" in picture_fault(tmp_path / "a.png")


def test_the_report_lists_problems_by_record(tmp_path, sound):
    triples = [
        triple(sound, "ok"),
        triple(tmp_path / "none.jpg", "lost"),
        triple(sound, "alike", "A bus.", "a  bus!"),
        triple(sound, "long"),
        triple(sound, "long"),
        triple(sound, "marks", "?", "!"),
    ]
    report = check(triples, tokens=lambda t, picture: 1024 if t.id == "long" else 1023, limit=1024)
    assert [(f.record, f.kind) for f in report.findings] == [
        ("lost", "image"),
        ("alike", "equal"),
        ("long", "prompt"),
        ("long", "prompt"),
    ]
    assert not report.sound and report.bad == {"lost", "alike", "long"} and report.duplicates == 1
    assert report.lines()[-1] == (
        "6 of 6 records checked: 4 problems (equal 1, image 1, prompt 2); ids used more than once: 1"
    )


def test_every_picture_of_a_record_is_checked_and_a_missing_one_where_it_is_needed(tmp_path, sound):
    triples = [triple((sound, tmp_path / "none.png", sound), "several"), triple(None, "text")]
    assert [finding.record for finding in check(triples).findings] == ["several"]
    (_, found) = check(triples, needs_picture="the noise dispreference").findings
    assert found.text == "record 'text' has no picture, and the noise dispreference needs one; remove the record"


def test_a_sample_looks_at_some_and_always_the_same(tmp_path, sound):
    triples = [triple(tmp_path / f"{n}.jpg", str(n)) for n in range(50)]
    first, second = check(triples, sample=5, seed=1), check(triples, sample=5, seed=1)
    assert first.checked == 5 and len(first.findings) == 5 and first.bad == second.bad
    assert check(triples, sample=5, seed=2).bad != first.bad
    assert check([triple(sound)], sample=5).checked == 1


def row(id: str, image: str, bad: str = "A blue bus.") -> dict:
    asked = {"from": "human", "value": "<image>\nWhat is it?"}
    return {
        "id": id,
        "image": image,
        "conversations": [asked, {"from": "gpt", "value": "A red bus."}],
        "rejected_conversations": [asked, {"from": "gpt", "value": bad}],
    }


def test_the_command_lists_records_and_ends_with_2(tmp_path, sound, capsys):
    (tmp_path / "cut.png").write_bytes(sound.read_bytes()[:-900])
    rows = [
        row("ok", "sound.png"),
        row("gone", "gone.png"),
        row("cut", "cut.png"),
        row("same", "sound.png", "A red bus."),
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert main(["check", str(tmp_path / "data.json"), "--images", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert "entry 1: record 'gone'" in printed and "record 'cut': picture" in printed
    assert "entry 3: record 'same'" in printed
    assert printed.splitlines()[-1] == "4 of 4 records checked: 3 problems (image 1, unreadable 2)"

    (tmp_path / "data.json").write_text(json.dumps(rows[:1]))
    assert main(["check", str(tmp_path / "data.json")]) == 0


def test_a_mistake_at_the_command_line_is_one_sentence():
    command = [sys.executable, "-m", "povid.preferences", "check", "absent.json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: absent.json does not exist; give the file that holds the records\n"


def test_convert_there_and_back(tmp_path, sound, capsys):
    (tmp_path / "data.json").write_text(json.dumps([row("a", "sound.png"), row("b", "gone.png")]))
    trl, data = str(tmp_path / "out.parquet"), tmp_path / "again" / "out.json"
    assert main(["convert", str(tmp_path / "data.json"), "--to", "trl", "--out", trl]) == 2
    assert "1 picture is not in" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "data.json"), "--to", "trl", "--out", trl, "--skip-bad"]) == 0
    assert "records skipped: 1" in capsys.readouterr().err
    assert main(["convert", trl, "--to", "trl", "--format", "trl", "--out", trl]) == 2
    assert "exists" in capsys.readouterr().err
    data.parent.mkdir()
    assert (
        main(["convert", trl, "--format", "trl", "--to", "povid", "--out", str(data), "--images", str(data.parent)])
        == 0
    )
    (back,) = povid.read(data, data.parent)
    assert back.image.read_bytes() == sound.read_bytes() and back.preferred[1].text == "A red bus."


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_300_damaged_pictures_decode_or_are_refused(sound):
    rng, refused = random.Random(3), 0
    with Image.open(sound) as picture:
        kinds = []
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            kinds.append(buffer.getvalue())
    for number in range(300):
        raw = bytearray(kinds[number % len(kinds)])
        if number % 3 == 0:
            del raw[rng.randrange(len(raw)) :]
        for _ in range(rng.choice((1, 4, 40)) if number % 3 else 0):
            raw[rng.randrange(min(len(raw), 400))] = rng.randrange(256)
        fault = picture_fault(bytes(raw))
        if fault is None:
            Image.open(io.BytesIO(bytes(raw))).convert("RGB")
        else:
            refused += 1
            assert "\n" not in fault and len(fault) < 400
    assert 100 < refused < 300
