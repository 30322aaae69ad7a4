"""The dashboard as code: its sections follow what the runs logged, and its specification is W&B's own."""

from __future__ import annotations

import json
import sys

import pytest

from povid.fault import Fault
from povid.report import workspace
from povid.report.__main__ import main
from povid.report.workspace import Panel


@pytest.fixture
def outputs(write, tmp_path):
    """Two finished runs, one with validation and probe; and one that still trains its second stage."""
    run = write("text", 0, columns=[{"key": "mine.score", "title": "Mine", "better": "high", "decimals": 1}])
    write("none", 0)
    for folder, files in (
        (run / "stage_1", {"validation": "epoch,steps,val/loss", "probe": "epoch,steps,probe/chair/CHAIR_I"}),
        (tmp_path / "outputs" / "young" / "stage_2", {}),
    ):
        folder.mkdir(parents=True)
        metrics = "epoch,step,kl,loss,rewards/chosen,rewards/rejected,rewards/rejected_noise,rewards/margins,own/thing"
        for name, header in {"metrics": metrics, **files}.items():
            (folder / f"{name}.csv").write_text(f"{header}\n")
    (run / "config.yaml").write_text("logger: {wandb: {project: mine, entity: we}}\n")
    return tmp_path / "outputs"


def test_sections_hold_what_the_runs_logged(outputs):
    found = {section.name: section.panels for section in workspace.sections(outputs, workspace.finished_runs(outputs))}
    assert list(found) == [
        "Training: stage 1",
        "Training: stage 2",
        "Validation",
        "Hallucination",
        "Comprehensive benchmarks",
        "Samples",
    ]
    titles = [panel.title for panel in found["Training: stage 2"]]
    assert titles == [f"stage_2/{name}" for name in ("loss", "rewards", "rewards/margins", "kl", "own/thing")]
    sides = tuple(f"stage_2/rewards/{side}" for side in ("chosen", "rejected", "rejected_noise"))
    assert found["Training: stage 2"][1] == Panel("line", "stage_2/rewards", sides, "stage_2/step")
    assert found["Validation"] == (Panel("line", "val/loss", ("val/loss",)),)
    metrics = [metric for panel in found["Hallucination"] for metric in panel.metrics]
    assert {"eval/chair/CHAIR_I", "eval/pope/f1", "eval/chair/coverage", "probe/chair/CHAIR_I"} <= {*metrics}
    assert Panel("bar", "Mine ↑", ("eval/mine/score",)) in found["Comprehensive benchmarks"]
    assert ("eval/mm_vet/total",) in [panel.metrics for panel in found["Comprehensive benchmarks"]]


def test_the_specification_is_written_without_a_login(outputs, capsys):
    pytest.importorskip("wandb_workspaces")
    assert main(["dashboard", str(outputs), "--offline", "--name", "Ours"]) == 0
    assert "not published: log in with `wandb login`" in capsys.readouterr().out
    written = json.loads((outputs / "dashboard.json").read_text())
    assert (written["entity"], written["project"], written["displayName"]) == ("we", "mine", "Ours")
    section = written["spec"]["section"]
    banks = {bank["name"]: bank["panels"] for bank in section["panelBankConfig"]["sections"]}
    assert banks["Validation"][0]["config"]["metrics"] == ["val/loss"]
    assert banks["Training: stage 1"][0]["config"]["xAxis"] == "stage_1/step"
    assert [panel["viewType"] for panel in banks["Samples"]] == ["Weave"] * len(workspace.TABLES)
    assert "summary:eval/chair/CHAIR_S" in section["runSets"][0]["runFeed"]["columnOrder"]


def test_what_stops_the_dashboard_is_said_in_a_sentence(outputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["dashboard", str(tmp_path / "empty")]) == 2
    assert "empty holds no run with metrics or results" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", str(outputs)]) == 2
    assert "error: the dashboard needs wandb-workspaces; install it with pip install" in capsys.readouterr().err


def test_a_workspace_that_is_not_taken_is_no_traceback():
    class Refused:
        entity = "we"

        def save(self):
            raise ValueError("project mine not found")

    with pytest.raises(Fault, match="W&B did not take the workspace .project mine not found.; check --entity"):
        workspace._published(Refused(), "we")
