"""Fetching benchmarks, alone and as a selection, from a server on this machine."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import hubs
import internet
import pytest
from PIL import Image
from servers import Files, file_server

from povid.benchmarks import __main__ as command
from povid.benchmarks import fetch
from povid.benchmarks.mmhal import MMHal
from povid.benchmarks.pope import POPE
from povid.fetching import download, many
from povid.fetching.source import Source


def jpeg() -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", (8, 8)).save(kept, "JPEG")
    return kept.getvalue()


NAMES = [f"COCO_val2014_{number:012d}.jpg" for number in (1, 2)]
ROWS = [
    {"question_id": n, "image": name, "text": "Is there a cup?", "label": "no"} for n, name in enumerate(NAMES, start=1)
]


@pytest.fixture
def files(monkeypatch) -> Files:
    """POPE with two pictures and, beside them in the archive, one that nobody asks about."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in (*NAMES, "COCO_val2014_000000000003.jpg"):
            archive.writestr(f"val2014/{name}", jpeg())
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(many, "PAUSE", 0.0)
    rows = "\n".join(map(json.dumps, ROWS)).encode()
    singles = {f"/val2014/{name}": jpeg() for name in NAMES}
    return Files({"/coco_pope_random.json": rows, "/val2014.zip": packed.getvalue()} | singles)


def sources(address: str) -> tuple[Source, ...]:
    return (
        Source(f"{address}/coco_pope_random.json", "coco_pope_random.json"),
        Source(f"{address}/val2014.zip", "val2014.zip", unpack="images", each=f"{address}/val2014/{{name}}"),
    )


def test_only_the_pictures_that_are_asked_about(files, tmp_path, monkeypatch, capsys):
    gone = files.content.pop(f"/val2014/{NAMES[1]}")
    with file_server(files) as address:
        monkeypatch.setattr(POPE, "sources", sources(address))
        assert command.main(["fetch", "pope", "--data", str(tmp_path)]) == 2
        shown = capsys.readouterr().out
        assert "1 were downloaded, 1 are missing" in shown
        assert shown.rstrip().splitlines()[-1].startswith("pope  pope: 1 of 2 images are missing, the first is")
        files.content[f"/val2014/{NAMES[1]}"] = gone
        del files.asked[:]
        assert command.main(["fetch", "pope", "--data", str(tmp_path)]) == 0
        assert [path for path, _ in files.asked] == [f"/val2014/{NAMES[1]}"]
        assert capsys.readouterr().out.rstrip().endswith("pope  complete")
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == NAMES


def test_a_selection_fetches_each_archive_once_and_goes_on_after_a_failure(files, tmp_path, monkeypatch):
    class Gone(POPE):
        name = "gone"
        sources = (Source("http://127.0.0.1:9/x.json", "x.json"),)

    said: list[str] = []
    with file_server(files) as address:
        monkeypatch.setattr(POPE, "sources", sources(address))
        selection = {name: POPE(data=tmp_path / name) for name in ("one", "two")}
        chosen = {"gone": Gone(data=tmp_path / "gone"), **selection}
        for _ in range(2):
            assert not fetch.main(chosen, pictures="all", say=said.append)
        assert fetch.main(selection, pictures="all", say=said.append)
        assert [path for path, _ in files.asked].count("/val2014.zip") == 1
    pictures = [tmp_path / name / "images" / "val2014" / "COCO_val2014_000000000003.jpg" for name in selection]
    assert pictures[0].samefile(pictures[1]), "a link, which takes no room"
    summary = said[said.index("") + 1 :][:3]
    assert summary[0].startswith("gone  http://127.0.0.1:9/x.json could not be downloaded")
    assert summary[1:] == ["one   complete", "two   complete"]


def test_every_selection_of_the_configuration_can_be_fetched(tmp_path):
    """The folders are those in which a run looks for the files."""
    found = command._selection("table3", tmp_path)
    assert len(found) == 8 and {benchmark.data for benchmark in found.values()} == {tmp_path / name for name in found}
    assert command._selection("repope", None)["repope"].data == Path("data/pope")
    assert command._selection("repope", tmp_path)["repope"].data == tmp_path


def test_files_of_the_hub_come_from_its_mirror_with_the_login(tmp_path, monkeypatch, capsys):
    """What the hub refuses is said as of any data set, half a file is resumed, and a file keeps its official name."""
    hub, files = hubs.Hub(), "/datasets/Shengcao1006/MMHal-Bench/resolve/main/"
    hub.repos["datasets/Shengcao1006/MMHal-Bench"] = internet.FILES[MMHal]()
    line = ["fetch", "mmhal", "--data", str(tmp_path)]
    monkeypatch.setattr(MMHal, "prompt_sources", ())
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hubs.serve(hub) as address:
        hubs.use(address, monkeypatch)
        hub.refuse = {f"GET {files}test_data.zip": (403, {"X-Error-Code": "GatedRepo"})}
        assert command.main(line) == 2
        assert "Shengcao1006/MMHal-Bench is gated: accept its license at https://hugg" in capsys.readouterr().out
        hub.refuse, hub.cut = {}, {f"GET {files}test_data.zip": 100}
        assert command.main(line) == 0
        assert [path for path in hub.asked if path.endswith(".json")] == [f"GET {files}response_template.json"]
    hubs.use("http://127.0.0.1:9", monkeypatch)  # another mirror, which is not asked
    assert command.main(line) == 0
    recorded = json.loads((tmp_path / "fetched.json").read_text())
    assert recorded["test_data.zip"]["url"] == f"https://huggingface.co{files}test_data.zip"
