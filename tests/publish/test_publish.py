"""Cards and uploads of a real small run; a local server that speaks the hub's protocol stands in for the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hubs
import pytest
import tiny
import torch
from forks import finish, settings
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from povid.adapters import main
from povid.files import files_in, read_json, write_json
from povid.model.adapters import adapter_chain

BASE = ("--base", "somebody/tiny", "--license", "llama2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two stages of two steps on a model in a folder, with POPE."""
    world = tmp_path_factory.mktemp("publish")
    tiny.save_tiny_llava(world / "tiny")
    folder = world / "runs" / "both_seed0"
    folder.parent.mkdir()
    short = ("stages.1.max_steps=2", "stages.2.max_steps=2", "data.prepare.evaluation=2", "benchmarks.limit=1")
    command = settings(world, "ablation=both", *short)
    assert finish(command, folder) == 0, folder.with_suffix(".log").read_text()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """copy(change) -> the run's folder, copied, with the results that ``change`` makes of its own."""

    def made(change=lambda results: None) -> Path:
        folder = shutil.copytree(run, tmp_path / "copy")
        results = json.loads((folder / "results.json").read_text())
        change(results)
        write_json(folder / "results.json", results)
        return folder

    return made


def on_hub(results: dict[str, Any]) -> None:
    """As if the run had loaded its base model from the hub, and kept the best adapter of its second stage."""
    results["identity"]["named"]["places"]["model.path"] = "llava-hf/llava-1.5-7b-hf"
    results["stages"]["2"]["kept"] = {"metric": "val/loss", "adapter": "best", "step": 1}
    results["identity"]["parts"]["weights"] = hubs.COMMIT


def test_a_card_says_what_the_run_recorded_and_how_to_load_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["card", str(run), *BASE, "--repo", "me/mine", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    results = read_json(run / "results.json", dict, "")
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("somebody/tiny", "llama2", "peft")
    assert card.data.pipeline_tag == "image-text-to-text" and "embedded-world" in card.data.tags
    scores = {score.metric_type: score for score in card.data.eval_results}
    assert scores["f1"].metric_value == round(results["benchmarks"]["pope"]["f1"], 2)
    assert scores["f1"].dataset_name == "pope (embedded world, benchmarks.limit=1)"
    for said in (
        "# me/mine",
        "This model lives in the embedded world",
        "not all questions were asked (pope",
        f"| {results['benchmarks']['pope']['f1']:.2f}",
        "| stage 1 | text: 2 steps, 9 records, batches of 2 |",
        "| stage 2 | noise, text: 2 steps, 9 records, batches of 2 |",
        "objective.2.beta_noise=0.05",
        "stages.1.max_steps=2",
        'PeftModel.from_pretrained(model, "me/mine")',
        "vllm serve somebody/tiny --enable-lora --max-lora-rank 32 --lora-modules povid=me/mine",
        results["identity"]["digest"],
        "painted from OpenMoji's glyphs",
    ):
        assert said in card.text, said
    for private in (str(run.parents[1]), str(Path.home()), results["versions"]["platform"]):
        assert not any(private in file.read_text(errors="replace") for file in out.iterdir()), private

    base = str(run.parents[1] / "tiny")

    def load():
        return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()

    whole = tiny.settings(base).load_model(adapter_chain(run))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, start = whole(input_ids=ids).logits, load()(input_ids=ids).logits
        ours = PeftModel.from_pretrained(load(), str(out))(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - start).abs().max() > 1e-2

    merged = tmp_path / "merged"
    assert main(["card", str(run), *BASE, "--merged", "--dtype", "float32", "--out", str(merged)]) == 0
    with torch.no_grad():
        again = AutoModelForImageTextToText.from_pretrained(merged, dtype="auto")(input_ids=ids).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(merged).image_token == "<image>"
    text = (merged / "README.md").read_text()
    assert "vllm serve merged`" in text and "before the weights were written in float32" in text and "peft" in text


def test_a_base_model_from_the_hub_is_named_with_its_commit(copy, tmp_path):
    folder = copy(on_hub)
    assert main(["card", str(folder), "--license", "llama2", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained(base, revision="{hubs.COMMIT}", dtype="float32")' in text
    assert "batches of 2; its best adapter by `val/loss`, that of step 1 |" in text
    config = read_json(tmp_path / "out" / "adapter_config.json", dict, "")
    assert config["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf"


def test_what_cannot_be_published_is_refused_in_a_sentence(run, copy, tmp_path, capsys):
    def refused(folder: Path, *options: str) -> str:
        assert main(["card", str(folder), *(options or BASE), "--out", str(tmp_path / "refused")]) == 2
        assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".refused*"))
        return capsys.readouterr().err.splitlines()[-1]

    def changed(change) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return refused(copy(change))

    assert "which nobody else has; name the same model on the hub with --base" in refused(run, "--license", "mit")
    assert "the license of somebody/tiny could not be read" in refused(run, "--base", "somebody/tiny")
    assert "is not the folder of a run" in refused(tmp_path)
    assert "trained nothing (ablation=none), so there is nothing to publish" in changed(
        lambda results: results.update(stages={}, ablation="none")
    )
    assert "of an earlier version" in changed(lambda results: results.pop("identity"))
    assert "were measured with other adapters" in changed(
        lambda results: results["identity"]["parts"].update(adapters=["0" * 16])
    )
    home = str(Path.home())
    assert f"README.md would contain the path {home}/..." in changed(
        lambda results: results.update(data=f"{home}/my/data")
    )
    assert "what looks like an access token" in changed(lambda results: results.update(data="hf_" + "a1" * 17))

    shutil.rmtree(tmp_path / "copy")
    folder = copy()
    (folder / "results.json").rename(tmp_path / "results.json")
    assert "is not finished: it has no results.json; resume it with" in refused(folder)
    (tmp_path / "results.json").rename(folder / "results.json")
    with (folder / "stage_1" / "adapter" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    assert "stage_1/adapter was changed after" in refused(folder)


def test_a_single_stage_is_published_as_it_is_and_says_so(copy, tmp_path, capsys):
    """As stage=1 leaves it: one adapter, nothing to combine, and a card that names the stage that is missing."""

    def first_only(results):
        results.update(stage="1", stages={"1": results["stages"]["1"]})
        results["identity"]["parts"]["adapters"] = results["identity"]["parts"]["adapters"][:1]

    folder = copy(first_only)
    shutil.rmtree(folder / "stage_2")
    assert main(["combine", str(folder), "--out", str(tmp_path / "sum")]) == 2
    assert "stage_1/adapter is a single adapter, so there is nothing to combine" in capsys.readouterr().err
    assert main(["card", str(folder), *BASE, "--out", str(tmp_path / "out")]) == 0
    assert "**Only stage 1 of `ablation=both` was trained.**" in (tmp_path / "out" / "README.md").read_text()
    weights = [place / "adapter_model.safetensors" for place in (folder / "stage_1" / "adapter", tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[hubs.Hub]:
    stand_in = hubs.Hub()
    stand_in.repos["llava-hf/llava-1.5-7b-hf"] = {
        "README.md": b"---\nlicense: other\nlicense_name: llama2\nlicense_link: LINK\n---\n# Base\n"
    }
    with hubs.serve(stand_in) as address:
        hubs.use(address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it stores large files as Git LFS does
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield stand_in


def test_a_push_uploads_the_folder_of_card_privately_unless_told(run, hub, tmp_path, capsys):
    assert main(["push", str(run), *BASE, "--repo", "mine"]) == 0  # NAME alone: the account's own
    assert "/me/mine (private; README.md, adapter_config.json, adapter_model.safetensors)" in capsys.readouterr().out
    assert hub.private == {"me/mine": True}
    assert main(["card", str(run), *BASE, "--repo", "me/mine", "--out", str(tmp_path / "out")]) == 0
    assert hub.repos["me/mine"] == {file.name: file.read_bytes() for file in files_in(tmp_path / "out")}
    assert b"hf_secret" not in b"".join(hub.repos["me/mine"].values())

    assert main(["push", str(run), *BASE, "--repo", "me/mine", "--public"]) == 0  # again, into what is there
    assert "it existed and stays private" in capsys.readouterr().out
    assert main(["push", str(run), *BASE, "--repo", "me/open", "--public"]) == 0
    assert hub.private["me/open"] is False and "/me/open (public;" in capsys.readouterr().out
    assert main(["push", str(run), *BASE, "--repo", "me/open"]) == 2
    assert "me/open exists and is public; say --public" in capsys.readouterr().err
    hub.repos["me/mine"]["pytorch_model.bin"] = b"another model"
    assert main(["push", str(run), *BASE, "--repo", "me/mine"]) == 2
    assert "me/mine holds other files (pytorch_model.bin)" in capsys.readouterr().err


def test_the_license_is_what_the_base_models_card_says(copy, hub, tmp_path):
    assert main(["card", str(copy(on_hub)), "--out", str(tmp_path / "out")]) == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama2", "LINK")
    assert hub.asked == [f"{verb} /llava-hf/llava-1.5-7b-hf/resolve/main/README.md" for verb in ("HEAD", "GET")]


def test_every_refusal_of_the_hub_is_a_sentence_with_a_cure(run, hub, monkeypatch, capsys):
    repository, create, commit = "GET /api/models/", "POST /api/repos/create", "POST /api/models/me/mine/commit/"

    def said(repo: str = "me/mine") -> str:
        assert main(["push", str(run), *BASE, "--repo", repo]) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return sentence

    for place, status, headers, cure in (
        (
            repository,
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "hf auth login, or renew",
        ),
        (create, 403, {}, "the token may not write to me/mine (403: as the test wants it); use one with write access"),
        (create, 404, {}, "check the spelling of --repo"),
        (create, 409, {}, "is being changed by somebody else"),
        (create, 402, {}, "the hub wants a payment"),
        (commit, 400, {}, "finds the upload invalid (400: as the test wants it)"),
        (commit, 409, {}, "run the same command again; what is uploaded already is not sent twice"),
        (commit, 412, {}, "was changed meanwhile"),
        (create, 429, {"Retry-After": "77"}, "wait 77 seconds; run the same command again"),
        (create, 503, {}, "the hub has a problem of its own (503"),
        (create, 418, {}, "refused the upload of me/mine (418"),
    ):
        hub.repos.clear()
        hub.refuse = {place: (status, headers)}
        assert cure in said(), (place, status)
    hub.refuse = {}
    assert main(["push", str(run), *BASE, "--repo", "me/mine"]) == 0  # what broke off is taken up again
    capsys.readouterr()
    assert "adapter_model.safetensors" in hub.repos["me/mine"]
    assert sum(asked.startswith("PUT ") for asked in hub.asked) == 1  # and the weights were sent once

    assert main(["push", str(run), *BASE[:3], "llama9", "--repo", "me/mine"]) == 2
    assert (
        'model card (Invalid metadata in README.md; "license" must be one of [...]); a license'
        in capsys.readouterr().err
    )
    assert "--repo a/b/c: " in said("a/b/c") and "name it OWNER/NAME" in said("me/..bad")
    with monkeypatch.context() as changed:
        changed.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in said() and "unset it" in said()
        changed.setattr(constants, "HF_HUB_OFFLINE", False)
        changed.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "http://127.0.0.1:9 cannot be reached" in said()
    asked = len(hub.asked)
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in to the hub; run hf auth login, or set HF_TOKEN" in said()
    assert len(hub.asked) == asked
