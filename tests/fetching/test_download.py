"""Fetching from a server on this machine that breaks off, lies, or knows no ranges."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import time
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from servers import Files, file_server

from povid.benchmarks import __main__ as command
from povid.fault import Fault
from povid.fetching import download as fetch
from povid.fetching.source import Source

DATA = bytes(range(256)) * 400  # 102,400 bytes
HASH = hashlib.sha256(DATA).hexdigest()


def get(files: Files, folder: Path, **more) -> list[Path]:
    with file_server(files) as address:
        source = Source(address + "/a.bin", "a.bin", **more)
        return fetch.fetch([source], folder, tries=3, pause=0.001)


def test_a_whole_file_is_recorded_and_not_fetched_again(tmp_path):
    files = Files({"/a.bin": DATA})
    with file_server(files) as address:
        for _ in range(2):
            source = Source(address + "/a.bin", "sub/a.bin", size=len(DATA), sha256=HASH)
            assert fetch.fetch([source], tmp_path) == [tmp_path / "sub" / "a.bin"]
    assert (tmp_path / "sub" / "a.bin").read_bytes() == DATA and len(files.asked) == 1
    record = json.loads((tmp_path / "fetched.json").read_text())["sub/a.bin"]
    assert (record["size"], record["sha256"]) == (len(DATA), HASH)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.bin"]


def test_a_cut_connection_is_continued_where_it_broke(tmp_path):
    files = Files({"/a.bin": DATA}, cut_after=[40_000, 10_000], etag='"v1"')
    assert get(files, tmp_path, sha256=HASH)[0].read_bytes() == DATA
    assert [wanted for _, wanted in files.asked] == [None, "bytes=40000-", "bytes=50000-"]


def test_a_second_run_goes_on_with_what_the_first_brought(tmp_path):
    with pytest.raises(Fault, match="could not be downloaded in 3 attempts .*60,000 of 102,400.*to resume"):
        get(Files({"/a.bin": DATA}, cut_after=[20_000] * 3), tmp_path)
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.part").stat().st_size == 60_000
    files = Files({"/a.bin": DATA})
    assert get(files, tmp_path)[0].read_bytes() == DATA
    assert files.asked == [("/a.bin", "bytes=60000-")]


def test_a_server_without_ranges_starts_again(tmp_path):
    files = Files({"/a.bin": DATA}, cut_after=[40_000], ranges=False)
    assert get(files, tmp_path, sha256=HASH)[0].read_bytes() == DATA


def test_a_part_that_is_whole_already_is_taken_and_one_that_is_too_long_is_not(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(DATA)
    assert get(Files({"/a.bin": DATA}), tmp_path, sha256=HASH)[0].read_bytes() == DATA
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.bin.part").write_bytes(DATA + b"more")
    assert get(Files({"/a.bin": DATA}), tmp_path / "b", sha256=HASH)[0].read_bytes() == DATA


def test_a_wrong_hash_or_size_leaves_nothing_behind(tmp_path):
    for expected in [{"sha256": "0" * 64}, {"size": 5}]:
        with pytest.raises(Fault, match="gave 102,400 bytes with sha256 .* expected were"):
            get(Files({"/a.bin": DATA}), tmp_path, **expected)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.bin")] == []


def test_an_address_that_is_gone_says_what_to_do_by_hand(tmp_path):
    with pytest.raises(Fault, match="/a.bin answers 404 .*by hand and put it into"):
        get(Files({}), tmp_path)


def test_no_network(tmp_path):
    source = Source("http://127.0.0.1:9/a.bin", "a.bin")
    with pytest.raises(Fault, match="could not be downloaded in 2 attempts .*refused.*check the network"):
        fetch.fetch([source], tmp_path, tries=2, pause=0.001)


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(Fault, match="a.bin.part cannot be written .*No space left.* 10 are free; make room"):
        get(Files({"/a.bin": DATA}), tmp_path)


def test_a_disk_that_fills_up_keeps_what_came_and_goes_on_later(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, block):
            if self.tell() + len(block) > 50_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    whole = Path.open

    def opened(path, mode="r", *arguments, **more):
        return (
            Full(path, mode)
            if path.suffix == ".part" and mode in ("ab", "wb")
            else whole(path, mode, *arguments, **more)
        )

    monkeypatch.setattr(fetch, "BLOCK", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(Fault, match="No space left on device.* after 40,000 bytes.*make room"):
            get(Files({"/a.bin": DATA}), tmp_path)
    files = Files({"/a.bin": DATA})
    assert get(files, tmp_path, sha256=HASH)[0].read_bytes() == DATA
    assert files.asked == [("/a.bin", "bytes=40000-")]


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archives_are_unpacked_once_and_removed(tmp_path):
    files = Files({"/a.bin": zipped({"d/x.json": b"1", "d/y.json": b"2", "__MACOSX/d/x.json": b"3"})})
    with file_server(files) as address:
        source = Source(address + "/a.bin", "a.zip", unpack="in", only=("x.json",))
        for _ in range(2):
            assert fetch.fetch([source], tmp_path) == [tmp_path / "in"]
    assert len(files.asked) == 1
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "fetched.json",
        "in/d/x.json",
    ]


def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path):
    for name in ["../out.txt", "/etc/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"]:
        files = Files({"/a.bin": zipped({"good.txt": b"1", name: b"2"})})
        with pytest.raises(Fault, match="would be written outside"):
            get(files, tmp_path / "data", unpack=".")
        assert not list(tmp_path.rglob("*.txt"))


def test_a_broken_archive_is_removed(tmp_path):
    with pytest.raises(Fault, match="not a complete zip archive"):
        get(Files({"/a.bin": DATA}), tmp_path, unpack=".")
    assert not (tmp_path / "a.bin").exists()


def test_odd_archives_are_a_sentence(tmp_path):
    whole = zipped({"a.txt": b"some text " * 50})
    encrypted = bytearray(whole)
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[whole.index(sign) + at] |= 1
    method = bytearray(whole)
    for sign, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        method[whole.index(sign) + at] = 77
    torn = bytearray(whole)
    torn[60:70] = b"x" * 10
    for number, (odd, sentence) in enumerate(
        (
            (encrypted, "is encrypted, which the official archive is not"),
            (method, "is not a complete zip archive"),
            (torn, "is not a complete zip archive"),
            (whole[: len(whole) // 2], "is not a complete zip archive"),
            (zipped({".": b"1"}), "is not a complete zip archive"),
        )
    ):
        with pytest.raises(Fault, match=sentence):
            get(Files({"/a.bin": bytes(odd)}), tmp_path / str(number), unpack=".")
        assert not list((tmp_path / str(number)).glob("*.txt"))
    for bits in range(0, len(whole) * 8, 5):  # whatever bit is flipped, it is unpacked or told of
        flipped = bytearray(whole)
        flipped[bits // 8] ^= 1 << bits % 8
        file = tmp_path / "flipped.zip"
        file.write_bytes(flipped)
        with suppress(Fault):
            fetch._unpack(Source("https://x", "flipped.zip", unpack="."), file, tmp_path / "out")


def test_a_file_of_unknown_length_is_not_taken_for_whole(tmp_path):
    with pytest.raises(Fault, match="does not say how long the file is"):
        get(Files({"/a.bin": DATA}, length=False), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    with pytest.raises(Fault, match="gave 5,000 bytes"):
        get(Files({"/a.bin": DATA}, length=False, cut_after=[5_000]), tmp_path, sha256=HASH)
    assert get(Files({"/a.bin": DATA}, length=False), tmp_path, sha256=HASH)[0].read_bytes() == DATA


@pytest.mark.parametrize("where", ["header", "chunk", "body"])
def test_a_server_that_drips_is_given_up(where, tmp_path, monkeypatch):
    """Each byte comes in time; the reply as a whole does not."""
    monkeypatch.setattr(fetch, "PATIENCE", 0.15)
    start = time.monotonic()
    with pytest.raises(Fault, match="in 3 attempts .fewer than 1,048,576 bytes came in 0.15 s"):
        get(Files({"/a.bin": DATA}, drip=where), tmp_path, sha256=HASH)
    assert time.monotonic() - start < 10
    assert where != "body" or (tmp_path / "a.bin.part").stat().st_size, "what came is kept"


def test_a_file_that_is_longer_than_it_should_be_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "BLOCK", 1000)
    with pytest.raises(Fault, match="gave 6,000 bytes"):
        get(Files({"/a.bin": DATA}, length=False), tmp_path, size=5_000)


def test_an_encrypted_address_must_not_lead_to_one_that_is_not():
    handler = fetch._Plain(fetch._Watch(), refused=True)
    with pytest.raises(Fault, match="leads to http://x/a.bin, which is not encrypted"):
        handler.http_open(urllib.request.Request("http://x/a.bin"))


def test_a_record_that_is_none_is_told_of(tmp_path):
    for content in ("[]", "3", '{"a.bin": 3}', "[" * 100_000):
        (tmp_path / "fetched.json").write_text(content)
        with pytest.raises(Fault, match="fetched.json is not a record of downloads"):
            get(Files({"/a.bin": DATA}), tmp_path)


def test_every_benchmark_has_official_addresses():
    for name in command.names():
        sources = command.find(name).sources
        assert sources, name
        assert len({source.file for source in sources}) == len(sources)
        assert all(source.url.startswith("https://") for source in sources)
