"""The four commands of the README's real run, word for word, from an empty folder to a published adapter.

The hub, the hosts of COCO and of the benchmarks, and the judge are servers on this machine, and LLaVA-1.5-7B is a
random model of the same layout. What a tiny machine needs is appended to the second command.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import hubs
import internet
import pytest
import tiny
import tiny_models
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from servers import ChatServer, Files, Say, last_text
from transformers import AutoModelForImageTextToText

from povid.benchmarks import coco
from povid.files import files_in
from povid.model.adapters import adapter_chain
from povid.report.runs import read

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llava-hf/llava-1.5-7b-hf"
NAMES = ("chair", "pope", "mmhal", "science_qa", "mme", "mmbench", "mm_vet", "llava_bench")
SMALL = (
    "trainer=auto",
    "trainer.accelerator=cpu",
    "model.lora.r=4",
    "model.lora.alpha=8",
    "stages.1.lr=1e-2",
    "stages.2.lr=1e-2",
    "samples=1",
    "logger=csv",
    *(f"benchmarks.{name}.max_new_tokens=3" for name in NAMES),
)


def commands() -> list[str]:
    """The command lines of the README's section on the real run."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The real run\n")[2].partition("\n## ")[0]
    return re.search(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1].splitlines()


class Place:
    """An empty folder with a checkout in it, an environment in which commands run there, and the servers."""

    def __init__(self, folder: Path, hub: hubs.Hub, files: Files, environment: dict[str, str]) -> None:
        self.folder, self.hub, self.files = folder, hub, files
        for name in ("train.py", "Makefile", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (folder / ".venv" / ".installed").touch()
        kept = {
            name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")
        }
        self.environment = kept | environment | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, line: str, *more: str, **environment: str) -> tuple[int, str]:
        """Exit status of a command line and what it printed."""
        done = subprocess.run(
            ["sh", "-c", f'{line} "$@"', "sh", *more],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return done.returncode, done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    hub, data = hubs.Hub(), yaml.safe_load((ROOT / "conf" / "data" / "povid_17k.yaml").read_text())["source"]
    hub.repos[f"datasets/{data['hub']}"] = {data["files"][0]: internet.preferences()}
    hub.commits[f"datasets/{data['hub']}"] = data["revision"]
    content = internet.official()
    for url in [url for url in content if url.startswith("https://huggingface.co/datasets/")]:
        owner, name, _, _, file = url.removeprefix("https://huggingface.co/datasets/").split("/", 4)
        hub.repos.setdefault(f"datasets/{owner}/{name}", {})[file] = content.pop(url)
    with ExitStack() as stack:
        judge = stack.enter_context(ChatServer(lambda body, _: Say(internet.judge_says(last_text(body)))))
        files, environment = stack.enter_context(internet.served(content, tmp_path / "internet"))
        address = stack.enter_context(hubs.serve(hub))
        (tmp_path / "empty").mkdir()
        yield Place(
            tmp_path / "empty",
            hub,
            files,
            environment
            | {
                "HF_ENDPOINT": address,
                "HF_TOKEN": "hf_secret",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "OPENAI_BASE_URL": judge.url,
                "OPENAI_API_KEY": "key",
            },
        )


def test_from_an_empty_folder_to_a_table_and_a_published_adapter(place, tmp_path, monkeypatch):
    fetch, train, look, publish = commands()
    tiny_models.save("llava_vicuna", tmp_path / "model")
    card = {"README.md": b"---\nlicense: other\nlicense_name: llama2\n---\n# Base\n"}
    model = {str(file.relative_to(tmp_path / "model")): file.read_bytes() for file in files_in(tmp_path / "model")}
    place.hub.repos[MODEL] = model | card

    first = f"{coco.HOST}/train2014/{internet.TRAIN[0]}"
    lost = place.files.content.pop(first)
    status, said = place.run(fetch)
    assert status == 2 and "the server answers 404 Not Found: 1 (first: data/coco/" in said, said
    place.files.content[first] = lost
    del place.files.asked[:]
    status, said = place.run(fetch)
    assert status == 0, said
    assert [address for address, _ in place.files.asked] == [first], "the rest is there"
    assert [line.split()[0] for line in said.splitlines() if line.endswith("  complete")] == list(NAMES), said

    assert not [address for address, login in place.files.logins if login], "the token is for the hub alone"

    place.hub.cut = {f"GET /{MODEL}/resolve/{hubs.COMMIT}/model.safetensors": 100_000}
    status, said = place.run(train, *SMALL)
    assert status == 0, said
    assert place.hub.ranges == ["bytes=100000-"], "the weights are resumed where the connection broke off"
    (table,) = place.folder.glob("outputs/paper/tables/table3.txt")
    runs = [read(file) for file in sorted(place.folder.glob("outputs/paper/*/results.json"))]
    assert [run.row for run in runs] == ["none", "text", "noise", "both"]
    for run in runs:
        assert not [name for name in NAMES if "missing" in run.results["benchmarks"][name]], run.results["benchmarks"]
    rows = [line for line in table.read_text().splitlines() if ", n = 1 " in line]
    assert len(rows) == 4 and not [line for line in rows if "–" in line], table.read_text()

    status, said = place.run(look)
    assert status == 0, said
    assert said.split()[-1] == (place.folder / "outputs/paper/report.html").resolve().as_uri()

    status, said = place.run(publish)
    assert status == 0, said
    assert f"{place.hub.address}/me/povid-llava (private; README.md, adapter_config.json" in said
    hubs.use(place.hub.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(5, 25)[None]).logits

    def base() -> torch.nn.Module:
        return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)

    trained = tiny.settings(tmp_path / "model").load_model(adapter_chain(runs[-1].folder))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), "me/povid-llava")), logits(trained), rtol=1e-4, atol=1e-4
    )
    assert (logits(trained) - logits(base())).abs().max() > 1e-2
