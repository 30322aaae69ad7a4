"""Fetching a data set, from a hub and a server of pictures on this machine, by the command itself."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hubs
import pytest
from PIL import Image
from servers import Files, file_server

from povid.fault import Fault
from povid.fetching import download, hub, many
from povid.fetching.many import fetch_many
from povid.preferences.__main__ import main
from povid.preferences.pictures import damage

YAML = """
defaults: [_base, _self_]
name: pairs
format: {{_target_: povid.preferences.formats.povid.read, _partial_: true}}
root: ${{oc.env:POVID_DATA,data}}/pairs
file: pairs.json
preferences: ${{.root}}/${{.file}}
images: ${{.root}}
source:
  hub: {repository}
  revision: {revision}
  files: [pairs.json]
  license: CC BY 4.0
  pictures: {{archive: "{address}/all.zip", each: "{address}/one/{{name}}", folder: coco, license: of their own}}
"""


def jpeg(shade: int) -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(kept, "JPEG")
    return kept.getvalue()


def pairs(*names: str) -> bytes:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]

    found = [
        {
            "id": name,
            "image": f"./data/coco/{name}",
            "conversations": turns("A cup."),
            "rejected_conversations": turns("A."),
        }
        for name in names
    ]
    return json.dumps(found).encode()


class Place:
    """A hub and a server of pictures, which are one, and an empty folder for the data."""

    def __init__(self, address: str, files: Files, folder: Path) -> None:
        self.address, self.files, self.folder = address, files, folder
        self.data = folder / "data"
        (folder / "conf" / "data").mkdir(parents=True)
        self.names(hubs.OLD)

    def names(self, revision: str) -> None:
        text = YAML.format(repository=hubs.REPOSITORY, revision=revision, address=self.address)
        (self.folder / "conf" / "data" / "pairs.yaml").write_text(text)

    def fetch(self, *more: str) -> int:
        del self.files.asked[:]
        return main(["fetch", "pairs", "--data", str(self.data), "--config-dir", str(self.folder / "conf"), *more])

    @property
    def asked(self) -> list[str]:
        return [path.partition("?")[0] for path, _ in self.files.asked]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    files = Files({f"/one/{n}.jpg": jpeg(n) for n in (1, 2, 3)}, etag='"v"')
    hubs.publish(files, hubs.OLD, {"pairs.json": pairs("1.jpg", "2.jpg", "3.jpg")}, license="cc-by-4.0")
    hubs.publish(files, hubs.NEW, {"pairs.json": pairs("1.jpg")}, "main")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(many, "PAUSE", 0.0)
    with file_server(files) as address:
        hubs.use(address, monkeypatch)
        yield Place(address, files, tmp_path)


def test_records_and_the_pictures_that_they_name(place, capsys):
    """A connection that is cut is continued, a picture that is not there is told of, and a second run asks for it
    alone: neither the hub nor the other pictures."""
    place.files.cut_after = [-1, 100]
    last = place.files.content.pop("/one/3.jpg")
    assert place.fetch() == 2
    shown = capsys.readouterr().out
    assert "license: CC BY 4.0" in shown and "the hub's card states the license cc-by-4.0" in shown
    assert "0 were there, 2 were downloaded, 1 are missing" in shown
    assert f"the server answers 404 Not Found: 1 (first: {place.data}/pairs/coco/3.jpg)" in shown
    file = f"/datasets/{hubs.REPOSITORY}/resolve/{hubs.OLD}/pairs.json"
    assert [wanted for path, wanted in place.files.asked if path == file] == [None, "bytes=100-"]
    root = place.data / "pairs"
    entry = json.loads((root / "fetched.json").read_text())["pairs.json"]
    assert (entry["repository"], entry["revision"]) == (hubs.REPOSITORY, hubs.OLD)
    assert entry["size"] == len((root / "pairs.json").read_bytes())
    logins = dict(place.files.logins)
    assert (logins[file], logins["/one/1.jpg"]) == ("Bearer hf_secret", None), "the login is the hub's alone"

    place.files.content["/one/3.jpg"] = last
    assert place.fetch() == 0
    assert place.asked == ["/one/3.jpg"]
    shown = capsys.readouterr().out
    assert "2 were there, 1 were downloaded, 0 are missing" in shown and "train on it: POVID_DATA=" in shown
    assert sorted(file.name for file in (root / "coco").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]
    assert place.fetch() == 0 and place.asked == []


def test_a_picture_that_is_cut_on_the_disk_is_replaced_by_a_whole_one(place):
    assert place.fetch() == 0
    cut = place.data / "pairs" / "coco" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:-30])
    place.files.refuse["/one/2.jpg"] = 503, {}
    assert place.fetch() == 2 and cut.exists(), "and stays until then"
    del place.files.refuse["/one/2.jpg"]
    assert place.fetch() == 0 and cut.read_bytes() == jpeg(2)


def test_another_revision_is_taken_only_when_asked_for(place, capsys):
    assert place.fetch("--pictures", "none") == 0
    place.names(hubs.NEW)
    assert place.fetch("--pictures", "none") == 2
    told = capsys.readouterr().err
    assert f"holds revision {hubs.OLD}" in told and f"names {hubs.NEW}; add --revision COMMIT" in told
    assert place.asked == []
    assert place.fetch("--pictures", "none", "--revision", hubs.OLD) == 0
    assert place.fetch("--pictures", "none", "--revision", hubs.NEW) == 0
    assert json.loads((place.data / "pairs" / "pairs.json").read_text())[0]["id"] == "1.jpg"
    assert place.fetch("--pictures", "none") == 0


def test_without_a_pinned_revision_the_newest_is_taken_and_kept(place):
    place.names("null")
    hubs.publish(place.files, hubs.OLD, {"pairs.json": pairs("1.jpg")}, "main")
    place.files.content[f"/api/datasets/{hubs.REPOSITORY}"] = place.files.content[
        f"/api/datasets/{hubs.REPOSITORY}/revision/main"
    ]
    assert place.fetch() == 0
    hubs.publish(place.files, hubs.NEW, {"pairs.json": pairs("2.jpg")}, "main")
    (place.data / "pairs" / "pairs.json").unlink()
    assert place.fetch() == 0
    assert json.loads((place.data / "pairs" / "pairs.json").read_text())[0]["id"] == "1.jpg"


def test_what_the_hub_refuses_is_a_sentence_and_costs_nothing(place, capsys):
    api = f"/api/datasets/{hubs.REPOSITORY}/revision/{hubs.OLD}"
    file = f"/datasets/{hubs.REPOSITORY}/resolve/{hubs.OLD}/pairs.json"
    part = place.data / "pairs" / "pairs.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(place.files.content[file][:50])
    for path, status, code, sentence in (
        (api, 404, "RepoNotFound", "the hub has no somebody/pairs, or it is private"),
        (api, 401, "RepoNotFound", "the hub has no somebody/pairs, or it is private"),
        (api, 401, "", "does not accept the login .*401"),
        (api, 404, "RevisionNotFound", "has no such revision"),
        (api, 429, "", "was asked too often .*429.*wait some minutes or log in"),
        (api, 500, "", "the hub answers 500 .*wait some minutes"),
        (
            file,
            403,
            "GatedRepo",
            "is gated: accept its license at https://huggingface.co/datasets/somebody/pairs, log in",
        ),
        (file, 401, "", "does not accept the login .*401"),
        (file, 403, "", "does not let this account read"),
        (file, 404, "EntryNotFound", "somebody/pairs has no file pairs.json; compare with"),
        (file, 429, "", "could not be downloaded in 5 attempts .*429.*wait some minutes"),
        (file, 503, "", "could not be downloaded in 5 attempts .*503.*to resume"),
    ):
        place.files.refuse = {path: (status, {"X-Error-Code": code} if code else {})}
        assert place.fetch() == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and re.search(sentence, told), (sentence, told)
    assert part.stat().st_size == 50, "what came before is kept"
    place.files.refuse = {}
    page, place.files.content[api] = place.files.content[api], b"<html>Please log in</html>"
    assert place.fetch() == 2
    assert "does not answer for somebody/pairs as the hub does" in capsys.readouterr().err
    place.files.content[api] = page
    assert place.fetch() == 0 and (file, "bytes=50-") in place.files.asked


def test_no_network_and_no_leave_to_use_it(place, capsys, monkeypatch):
    hubs.use("http://127.0.0.1:9", monkeypatch)
    assert place.fetch() == 2
    assert "the hub cannot be reached for somebody/pairs (" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert place.fetch() == 2
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloading it" in capsys.readouterr().err


def test_what_lies_there_already_is_taken_or_told_of_and_never_replaced(place, capsys):
    file = place.data / "pairs" / "pairs.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"[]")
    assert place.fetch() == 2 and file.read_bytes() == b"[]"
    assert "is there already and is not the file of" in capsys.readouterr().err
    file.write_bytes(pairs("1.jpg", "2.jpg", "3.jpg"))  # downloaded by hand
    assert place.fetch() == 0 and not [path for path in place.asked if "resolve" in path]
    file.write_bytes(file.read_bytes()[:99])
    assert place.fetch() == 2
    assert "has 99 bytes, but" in capsys.readouterr().err and file.stat().st_size == 99


def test_a_disk_that_is_too_small_is_told_of_first_and_one_that_fills_up_loses_nothing(place, capsys, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
        assert place.fetch() == 2
    assert "MB more and 0.0 MB are free; make room" in capsys.readouterr().err
    assert not [path for path in place.asked if "resolve" in path]

    def full(source: str, target: Path) -> None:
        if str(target).endswith("3.jpg"):
            raise OSError(errno.ENOSPC, "No space left on device")
        keep(source, target)

    keep = many.os.replace
    with monkeypatch.context() as later:
        later.setattr(many.os, "replace", full)
        later.setattr(many, "CONNECTIONS", 1)
        assert place.fetch() == 2
    assert "cannot be written (No space left on device) after 2 of 3 files" in capsys.readouterr().err
    assert sorted(file.name for file in (place.data / "pairs" / "coco").iterdir()) == ["1.jpg", "2.jpg"]
    assert place.fetch() == 0 and place.asked == ["/one/3.jpg"]


def test_two_downloads_into_one_folder(place, capsys):
    (place.data / "pairs").mkdir(parents=True)
    with download._alone(place.data / "pairs"):
        assert place.fetch() == 2
    assert "another process is downloading into" in capsys.readouterr().err


def test_many_files_give_up_when_none_comes_and_take_nothing_for_a_picture(tmp_path, monkeypatch):
    files = Files({"/page.jpg": b"<html>a login page</html>", "/good.jpg": jpeg(1)}, cut_after=[20])
    with file_server(files) as address:
        wanted = {f"{address}/{name}.jpg": tmp_path / f"{name}.jpg" for name in ("good", "page")}
        monkeypatch.setattr(many, "CONNECTIONS", 1)
        monkeypatch.setattr(many, "PAUSE", 0.0)
        outcome = fetch_many(wanted, damage, title="t")
        assert outcome.came == 1, "in spite of the cut"
        assert "no whole picture (picture it cannot be decoded" in outcome.missing[tmp_path / "page.jpg"]
        assert [file.name for file in tmp_path.iterdir()] == ["good.jpg"]
        del files.asked[:]
        monkeypatch.setattr(many, "FAILURES_IN_A_ROW", 3)
        with pytest.raises(Fault, match=r"the last 3 files could not be downloaded \(the server answers 404"):
            fetch_many({f"{address}/{n}": tmp_path / f"{n}" for n in range(500)}, damage, title="t")
    assert len(files.asked) < 100


def test_the_whole_archive_of_pictures(place, capsys):
    """Its folders are dropped, for the records do not name them, and an archive that leads elsewhere is refused."""

    def packed(*names: str) -> bytes:
        kept = io.BytesIO()
        with zipfile.ZipFile(kept, "w") as archive:
            for number, name in enumerate(names):
                archive.writestr(name, jpeg(number))
        return kept.getvalue()

    place.files.content["/all.zip"] = packed("train/1.jpg", "../2.jpg")
    assert place.fetch("--pictures", "all") == 2
    assert "would be written outside" in capsys.readouterr().err and not list(place.folder.rglob("*.jpg"))
    (place.data / "pairs" / "all.zip").unlink()
    place.files.content["/all.zip"] = packed("train/1.jpg", "train/2.jpg", "train/3.jpg")
    for _ in range(2):
        assert place.fetch("--pictures", "all") == 0
    assert place.asked == [] and len(list((place.data / "pairs" / "coco").glob("*.jpg"))) == 3
    assert not (place.data / "pairs" / "all.zip").exists()
    assert place.fetch() == 0 and place.asked == [], "all that the records name is there"


def test_what_a_hub_lists_leads_nowhere_outside(place):
    hubs.publish(place.files, hubs.OLD, {"../out.json": b"[]"})
    with pytest.raises(Fault, match="leads out of the data"):
        hub.revision_of(hubs.REPOSITORY, hubs.OLD, ["*"])
