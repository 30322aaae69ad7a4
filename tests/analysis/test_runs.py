"""Analyses of run folders: numbers with the run's identity, what is refused, and the figures that compare runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from povid.analysis import analyses, subject
from povid.analysis.__main__ import main
from povid.analysis.subject import OVERRIDE, compose, node
from povid.files import write_json
from povid.model.adapters import adapter_digest
from povid.report.paper import TABLE_1
from povid.run.content import weights_digest
from povid.scenes.world import prepare

QUICK = ["--limit", "3", "--steps", "0", "500"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("world") / "w", preferences=2, tuning=2, evaluation=8)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA on the embedded world's model that changes what it says."""
    policy = node(compose([]), "model").policy(adapted=True)
    torch.manual_seed(0)
    for parameter in policy.trained_parameters()[0]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    policy.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def settings(world) -> dict:
    return compose([f"benchmarks.chair.data={world / 'evaluation'}", f"data.objects={world / 'habits.json'}"])


@pytest.fixture
def write(tmp_path, settings, adapter):
    """write(row, seed, tuned=False) -> a run folder with what an analysis reads of it."""

    def run(row: str, seed: int = 0, *, tuned: bool = False) -> Path:
        folder = tmp_path / "outputs" / f"{row}_seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        if tuned:
            shutil.copytree(adapter, folder / "stage_1" / "adapter")
            note = {"init_from": [], "adapter_digest": adapter_digest(adapter)}
            write_json(folder / "stage_1" / "stage.json", note)
        source = node(settings, "model").source
        parts = {"adapters": [adapter_digest(adapter)] if tuned else [], "weights": weights_digest(source)}
        same = parts | {"row": row}
        identity = {
            "digest": f"{row}{seed}",
            "parts": parts | {"seed": seed},
            "row": same,
            "named": {"settings": {}, "places": {}},
        }
        chair = {"CHAIR_S": 60.0 - 10 * tuned, "CHAIR_I": 20.0 - 5 * tuned, "coverage": 80.0, "words": 20.0}
        results = {
            "row": row,
            "ablation": row,
            "seed": seed,
            "model": "scenes_tiny",
            "data": "scenes",
            "benchmarks": {"chair": chair, "pope": {"f1": 90.0 + tuned}},
            "identity": identity,
            "adapters": [str(folder / "stage_1" / "adapter")] if tuned else [],
            "started": "2026-01-01",
        }
        write_json(folder / "results.json", results)
        return folder

    return run


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_every_row_carries_its_curves_under_its_identity(write, tmp_path, capsys, monkeypatch):
    base, tuned = write("none"), write("text", tuned=True)
    outputs = str(tmp_path / "outputs")
    for name, more in (("token_uncertainty", QUICK), ("attention", ["--limit", "3", "--max-new-tokens", "8"])):
        assert main([name, outputs, *more]) == 0, capsys.readouterr().err
        before, after = read(base / f"analysis/{name}.json"), read(tuned / f"analysis/{name}.json")
        assert (before["digest"], after["digest"]) == ("none0", "text0")
        assert before["measure"] == after["measure"] and before["measure"]["pictures"] == 3
        assert before["before"] == before["after"] == after["before"] != after["after"]
        kind = "partner" if name == "token_uncertainty" else "image"
        for old, new, change in zip(
            *(after[part][kind]["mean"] for part in ("before", "after", "change")), strict=True
        ):
            assert change == pytest.approx(new - old, abs=2e-6)
        compared = read(tmp_path / f"outputs/analysis/{name}.json")
        assert list(compared["rows"]) == ["none", "text"]
        for file in (base / f"analysis/{name}.png", tmp_path / f"outputs/analysis/{name}.png"):
            with Image.open(file) as picture:
                assert picture.width == 1080
        assert "The paper" in after["caption"] and "Here" in after["caption"]
        with monkeypatch.context() as patched:  # measured already, under these identities: no model is loaded
            patched.setattr(subject.Subject, "load", None)
            assert main([name, outputs, *more]) == 0
    assert main(["token_uncertainty", str(base), "--limit", "2", "--steps", "0"]) == 0  # another measurement
    assert read(base / "analysis/token_uncertainty.json")["measure"]["pictures"] == 2


def test_seeds_of_a_row_are_averaged_and_other_rows_are_not(write, tmp_path):
    for seed in range(2):
        write("text", seed, tuned=True)
    write("none")
    quick = ["--limit", "1", "--steps", "0", "500"]
    assert main(["token_uncertainty", str(tmp_path / "outputs"), *quick]) == 0
    rows = read(tmp_path / "outputs/analysis/token_uncertainty.json")["rows"]
    assert {name: [run["seed"] for run in row["runs"]] for name, row in rows.items()} == {"none": [0], "text": [0, 1]}
    for place in range(2):
        seeds = [seed["mean"][place] for seed in rows["text"]["partner"]["seeds"]]
        assert rows["text"]["partner"]["mean"][place] == pytest.approx(sum(seeds) / 2)


def test_one_picture_and_a_model_from_the_command_line(world, adapter, tmp_path, capsys):
    image = min((world / "evaluation/images").iterdir())
    chosen = [f"adapters=[{adapter}]", f"outputs={tmp_path / 'none'}"]
    more = ["--image", str(image), "--out", str(tmp_path)]
    prefix = ["--prefix", "This image shows a knife and a", "--words", "spoon", "wine glass", "--steps", "0", "999"]
    assert main(["token_uncertainty", *chosen, *more, *prefix]) == 0, capsys.readouterr().err
    (found,) = read(tmp_path / f"token_uncertainty_{image.stem}.json")["models"]
    assert set(found["words"]) == {"spoon", "wine glass"} and len(found["most_likely"]) == 2
    assert all(0 <= value <= 1 for values in found["words"].values() for value in values)
    assert main(["attention", *chosen, *more, "--max-new-tokens", "8"]) == 0, capsys.readouterr().err
    found = read(tmp_path / f"attention_{image.stem}.json")
    assert found["run"]["row"] == "tuned" and found["texts"]["count"] == 1
    assert found["change"]["image"]["layers"]["mean"] != 0
    assert not (tmp_path / "none").exists()  # the data's own pictures are not needed


def test_a_damaged_run_is_refused_in_one_sentence(write, tmp_path, capsys):
    def refused(folder: Path, sentence: str, command: str = "attention") -> None:
        assert main([command, str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said and "Traceback" not in said, said
        assert not (folder / "analysis").exists()

    def rewrite(file: Path, change) -> None:
        content = yaml.safe_load(file.read_text())
        change(content)
        file.write_text(json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content))

    cases = (
        (lambda tree: tree["model"].update(_target_="os.system"), "a class is not taken from a run folder"),
        (lambda tree: tree["model"].update(architecture={"_target_": "os.system"}), "model.architecture names a class"),
        (lambda tree: tree["model"].update(dtype="float7"), "model.dtype: found 'float7'"),
        (lambda tree: tree.update(benchmarks={}), "names no pictures with known objects (benchmark chair)"),
        (lambda tree: tree["benchmarks"]["chair"].update(data=str(tmp_path / "gone")), "synonyms.txt cannot be read"),
    )
    for number, (change, sentence) in enumerate(cases):
        folder = write("none", number)
        rewrite(folder / "config.yaml", change)
        refused(folder, sentence)
    folder = write("none", 10)
    rewrite(folder / "config.yaml", lambda tree: tree["data"].update(objects=None))
    refused(folder, "data.objects=FILE", "token_uncertainty")
    (folder / "config.yaml").write_text("a: [")
    refused(folder, "config.yaml cannot be read")
    folder = write("none", 11)
    rewrite(folder / "results.json", lambda found: found["identity"]["parts"].update(weights="0" * 16))
    refused(folder, "was evaluated with other weights than are there now")
    folder = write("text", 12, tuned=True)
    shutil.rmtree(folder / "stage_1")
    refused(folder, "adapter_config.json cannot be read")
    folder = write("text", 13, tuned=True)
    rewrite(folder / "stage_1/adapter/adapter_config.json", lambda found: found.update(lora_alpha=1))
    refused(folder, "was changed after")
    folder = write("text", 14, tuned=True)
    rewrite(folder / "results.json", lambda found: found["identity"]["parts"].update(adapters=[]))
    refused(folder, "was evaluated with other adapters than are there now")
    folder = write("none", 15)
    rewrite(folder / "results.json", lambda found: found.pop("identity"))
    refused(folder, "does not say which adapters and weights it was evaluated with")


def test_what_does_not_fit_is_one_sentence(write, tmp_path, capsys):
    write("none")
    outputs = str(tmp_path / "outputs")
    for arguments, sentence in (
        (["token_uncertainty", outputs, "--image", "gone.png", "--words", "a"], "gone.png does not exist"),
        (["token_uncertainty", outputs, "--image", "gone.png"], "--image needs --words"),
        (["token_uncertainty", outputs, "--words", "a"], "name it with --image"),
        (["token_uncertainty", outputs, "--prefix", "A knife,"], "has no {}"),
        (["token_uncertainty", outputs, "--steps", "1000"], "the scheduler has steps 0 to 999"),
        (["token_uncertainty", outputs, "nois.step=3"], "did you mean 'noise.step'?"),
        (["attention", outputs, "adapters=[x]"], "run folders say which model they hold"),
        (["attention", str(tmp_path / "none")], "is not a folder"),
        (["attention", "model=served"], "only a model whose weights are loaded here"),
        (["strips", "gone.png"], "gone.png does not exist"),
        (["radar", "seed=3"], "the radar reads finished runs"),
    ):
        assert main(arguments) == 2, arguments
        assert sentence in capsys.readouterr().err, arguments


def test_folders_and_overrides_are_told_apart():
    for text in ("noise=cosine", "+a.b=1", "stages@stages.1=x", "model.path=/a b", "hydra.searchpath=[file://x]"):
        assert OVERRIDE.fullmatch(text)
    for text in ("outputs", "./a=b", "/runs/2026_seed=0"):
        assert not OVERRIDE.fullmatch(text)


def test_the_radar_has_the_papers_axes_and_values(write, tmp_path, capsys):
    """POVID by Table 1: CHAIR_S 31.8, so 68.2 on the radar; of ours, rows stand on the three axes that they have."""
    assert main(["radar", "--out", str(tmp_path / "paper")]) == 0
    (panel,) = read(tmp_path / "paper/radar.json")["panels"].values()
    assert [axis["name"] for axis in panel["axes"].values()] == [
        "SciQA-IMG", "MMBench", "POPE", "LLaVA-Bench", "100 - CHAIR$_S$", "100 - CHAIR$_I$", "MM-Vet", "MMHal",
    ]  # fmt: skip
    assert list(panel["rows"]) == [row.name for row in TABLE_1]
    povid = panel["rows"]["POVID"]
    assert [povid[key] for key in panel["axes"]] == [68.8, 64.9, 86.9, 68.7, 68.2, 94.6, 31.8, 2.69]
    write("none"), write("text", tuned=True)
    assert main(["radar", str(tmp_path / "outputs")]) == 0
    panels = read(tmp_path / "outputs/analysis/radar.json")["panels"]
    ours = panels["model scenes_tiny, data scenes"]
    assert ours["rows"]["text"] == {
        "pope.f1": 91.0, "chair.CHAIR_S": 50.0, "chair.CHAIR_I": 85.0, "runs": 1, "coverage": 80.0, "words": 20.0,
    }  # fmt: skip
    assert ours["missing"] == [
        "science_qa.img_accuracy", "mmbench.accuracy", "llava_bench.overall", "mm_vet.total", "mmhal.score",
    ]  # fmt: skip
    for folder in (tmp_path / "outputs").glob("*_seed0"):
        found = read(folder / "results.json")
        found["benchmarks"].pop("pope")
        write_json(folder / "results.json", found)
    assert main(["radar", str(tmp_path / "outputs")]) == 2
    assert "it needs three" in capsys.readouterr().err


def test_strips_show_every_distortion(tmp_path, world, capsys):
    image = min((world / "evaluation/images").iterdir())
    assert main(["strips", str(image), "--out", str(tmp_path), "--steps", "0", "500", "999"]) == 0, (
        capsys.readouterr().err
    )
    found = read(tmp_path / f"strips_{image.stem}.json")
    conf = Path(__file__).resolve().parents[2] / "conf/noise"
    assert sorted(found["distortions"]) == sorted(file.stem for file in conf.glob("*.yaml"))
    views = {name: [view["rms_change"] for view in one["views"]] for name, one in found["distortions"].items()}
    assert views["sigmoid"] == sorted(views["sigmoid"]) and views["sigmoid"][0] < 0.01
    assert views["linear"][1] > views["sigmoid"][1]  # at step 500, as conf/noise/linear.yaml says


def test_an_analysis_is_one_file():
    assert set(analyses()) == {"attention", "radar", "strips", "token_uncertainty"}
    assert all(module.__doc__ and callable(module.arguments) for module in analyses().values())
