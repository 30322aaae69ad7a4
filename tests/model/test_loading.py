"""What stands in the way of loading a model, in one sentence with its cure."""

from __future__ import annotations

import errno

import hubs
import pytest
import tiny
from servers import Files, file_server

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


def test_weights_from_the_hub_are_resumed_in_the_middle_of_a_file(tmp_path, monkeypatch):
    """The hub dies after so many bytes; they are kept, asked for no second time, and the cache is the hub's own."""
    folder, hub = tiny.save_tiny_llava(tmp_path / "model"), hubs.Hub()
    hub.repos["somebody/model"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    path = f"/somebody/model/resolve/{hubs.COMMIT}/model.safetensors"
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("povid.fetching.download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    settings = tiny.settings(folder).model_copy(update={"path": "somebody/model"})
    honest = hub.answer
    with hubs.serve(hub) as address:
        hubs.use(address, monkeypatch)
        hub.cut = {f"GET {path}": 1000}

        def dying(method: str, path: str, body: bytes):
            return honest(method, path, body) if hub.cut else (503, {}, {})

        hub.answer = dying
        with pytest.raises(Fault, match="model.safetensors could not be downloaded in 5 attempts .503"):
            settings.load_model()
        assert [file.stat().st_size for file in cache.rglob("*.part")] == [1000]
        hub.answer = honest
        del hub.asked[:], hub.ranges[:]
        settings.load_model()
        assert hub.asked.count(f"GET {path}") == 1 and hub.ranges == ["bytes=1000-"]
        del hub.asked[:]
        settings.load_model()
        assert f"GET {path}" not in hub.asked
    (snapshot,) = cache.glob("models--somebody--model/snapshots/*")
    assert snapshot.name == hubs.COMMIT and not list(cache.rglob("unfinished"))
    assert (snapshot / "model.safetensors").read_bytes() == hub.repos["somebody/model"]["model.safetensors"]
