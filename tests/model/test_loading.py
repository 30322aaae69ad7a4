"""What stands in the way of loading a model, in one sentence with its cure."""

from __future__ import annotations

import errno

import hubs
import pytest
import tiny
import torch
from servers import Files, file_server
from transformers import AutoModelForImageTextToText

from povid.fault import Fault
from povid.model.loading import loading
from povid.run.content import weights_digest


def test_what_the_hub_says_of_a_model_is_a_sentence(tmp_path, monkeypatch):
    """From transformers' own loading, which wraps the hub's errors in its own."""
    files = Files({})
    path = "/somebody/model/resolve/main/config.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = tiny.settings(tmp_path).model_copy(update={"path": "somebody/model"})
    with file_server(files) as address:
        hubs.use(address, monkeypatch)
        for status, code, sentence in (
            (403, "GatedRepo", "somebody/model is gated: accept its license at https://huggingface.co/somebody/model"),
            (401, "RepoNotFound", "the hub has no somebody/model, or it is private"),
            (404, "EntryNotFound", "somebody/model.*config.json"),
        ):
            files.refuse[path] = status, {"X-Error-Code": code}
            for load in (settings.load_processor, lambda: weights_digest("somebody/model")):
                with pytest.raises(Fault, match=sentence):
                    load()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Fault, match="somebody/other is not on this machine, and HF_HUB_OFFLINE"):
        settings.model_copy(update={"path": "somebody/other"}).load_processor()
    for raised, sentence in (
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*set HF_HOME"),
        (ConnectionResetError("reset by peer"), "the hub cannot be reached for a/b .reset by peer"),
    ):
        with pytest.raises(Fault, match=sentence), loading("a/b"):
            try:
                raise raised
            except OSError as error:
                raise OSError("a library's own words") from error


def test_weights_that_are_cut_are_a_fault(tmp_path):
    tiny.save_tiny_llava(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Fault, match="a file with the weights of .* is cut or damaged .*; put a whole copy there"):
        tiny.settings(tmp_path).load_model()


def test_weights_from_the_hub_are_resumed_in_the_middle_of_a_shard(tmp_path, monkeypatch):
    """The hub dies in the second shard; nothing that came is asked for again, and the cache is the hub's own."""
    folder, hub = tmp_path / "model", hubs.Hub()
    settings = tiny.settings(tiny.save_tiny_llava(folder)).model_copy(update={"path": "somebody/model"})
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="100KB")
    hub.repos["somebody/model"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    first, second, *others = [
        f"GET /somebody/model/resolve/{hubs.COMMIT}/{f.name}" for f in sorted(folder.glob("*-of-*"))
    ]
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("povid.fetching.download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    honest = hub.answer
    with hubs.serve(hub) as address:
        hubs.use(address, monkeypatch)
        hub.cut = {second: 1000}
        hub.answer = lambda *asked: honest(*asked) if hub.cut else (503, {}, {})
        with pytest.raises(Fault, match="model-00002-of-.* could not be downloaded in 5 attempts .503"):
            settings.load_model()
        assert [file.stat().st_size for file in cache.rglob("*.part")] == [1000]
        hub.answer = honest
        del hub.asked[:]
        loaded = settings.load_model()
        assert first not in hub.asked and hub.ranges[-1] == "bytes=1000-"
        assert [hub.asked.count(shard) for shard in (second, *others)] == [1] * (1 + len(others))
        del hub.asked[:]
        settings.load_model()
        assert not [asked for asked in hub.asked if "GET" in asked and "-of-" in asked]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))
    assert not list(cache.rglob("unfinished"))
