"""A Weights & Biases workspace made from run folders: the dashboard as code."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from povid.benchmarks.benchmark import Column
from povid.fault import Fault
from povid.files import write_text
from povid.internals import workspace_view
from povid.report import paper
from povid.report.runs import Run, find_runs
from povid.report.tables import all_columns

# Metrics that every run logs stand first, in this order; whatever else the runs hold follows.
FIRST = ("loss", "rewards", "rewards/margins", "rewards/accuracies", "logps", "kl", "grad_norm", "lr")
SIDES = ("chosen", "rejected")  # belong into one panel
TABLES = ("stage_1/samples", "stage_2/samples", "eval/samples")


@dataclass(frozen=True)
class Panel:
    """``kind``: line (``metrics`` over ``x``), bar (last values), scatter (two metrics: x, y) or table (its name)."""

    kind: str
    title: str
    metrics: tuple[str, ...]
    x: str = "Step"


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]


def finished_runs(outputs: Path) -> list[Run]:
    """The runs below ``outputs`` that have results; none where nothing has finished yet."""
    return find_runs(outputs) if any(outputs.glob("**/results.json")) else []


def sections(outputs: Path, runs: Sequence[Run]) -> list[Section]:
    """The sections of the dashboard, with a panel for whatever the runs below ``outputs`` have logged.

    ``runs``: those that have finished.

    Raises:
        Fault: there is no run.
    """
    stages = sorted({file.parent.name for file in outputs.glob("**/stage_*/metrics.csv")})
    if not stages and not runs:
        raise Fault(f"{outputs} holds no run with metrics or results; name a folder with run folders, at any depth")
    found = []
    for stage in stages:
        names = [name.removeprefix("train/") for name in logged(outputs, f"{stage}/metrics.csv")]
        panels = lines(names, f"{stage}/", x=f"{stage}/step")
        found.append(Section(f"Training: {stage.replace('_', ' ')}", panels))
    validated = [name.removeprefix("val/") for name in logged(outputs, "stage_*/validation.csv")]
    found.append(Section("Validation", lines(validated or ["loss", "rewards/margins", "rewards/accuracies"], "val/")))
    probed = tuple(Panel("line", name, (name,)) for name in logged(outputs, "stage_*/probe.csv"))
    columns = all_columns(runs)
    hallucination = {key.partition(".")[0] for key in paper.HALLUCINATION}
    about = [column for column in columns if column.key.partition(".")[0] in hallucination]
    against = Panel("scatter", "CHAIR_I against coverage", ("eval/chair/coverage", "eval/chair/CHAIR_I"))
    found.append(Section("Hallucination", (against, *bars(about), *probed)))
    others = [column for column in columns if column not in about]
    found.append(Section("Comprehensive benchmarks", bars(others)))
    found.append(Section("Samples", tuple(Panel("table", name, (name,)) for name in TABLES)))
    return found


def lines(names: Iterable[str], prefix: str, x: str = "Step") -> tuple[Panel, ...]:
    """A panel for each metric; the two sides of a metric, and its variants by response, share one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        kind = last.split("_")[0] if parent else last
        groups.setdefault(parent if kind in SIDES else f"{parent}/{kind}".lstrip("/"), []).append(f"{prefix}{name}")
    order = sorted(groups, key=lambda title: (FIRST.index(title) if title in FIRST else len(FIRST), title))
    return tuple(Panel("line", f"{prefix}{title}", tuple(groups[title]), x) for title in order)


def bars(columns: Iterable[Column]) -> tuple[Panel, ...]:
    return tuple(Panel("bar", column.heading, (f"eval/{column.key.replace('.', '/')}",)) for column in columns)


def logged(outputs: Path, pattern: str) -> list[str]:
    """The names of the metrics in CSV files below ``outputs``, each once; a damaged file names none."""
    names: dict[str, None] = {}
    for file in sorted(outputs.glob(f"**/{pattern}")):
        with file.open(newline="", encoding="utf-8", errors="replace") as source:
            header = next(csv.reader(source), [])
        names |= dict.fromkeys(name for name in header if name not in ("epoch", "step", "steps"))
    return list(names)


def workspace(found: Sequence[Section], *, entity: str, project: str, name: str) -> Any:
    """The sections as a workspace of wandb-workspaces; the scores are also the first columns of its table of runs.

    Raises:
        Fault: the package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise Fault("the dashboard needs wandb-workspaces; install it with pip install 'povid[dashboard]'") from None

    def made(panel: Panel) -> Any:
        if panel.kind == "line":
            return reports.LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics))
        if panel.kind == "bar":
            return reports.BarPlot(title=panel.title, metrics=list(panel.metrics))
        if panel.kind == "scatter":
            x, y = (reports.SummaryMetric(metric) for metric in panel.metrics)
            return reports.ScatterPlot(title=panel.title, x=x, y=y)
        return reports.WeavePanelSummaryTable(table_name=panel.metrics[0])

    pinned = [
        metric for section in found for panel in section.panels if panel.kind == "bar" for metric in panel.metrics
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        auto_generate_panels=False,
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=["run:displayName", *map("summary:{}".format, pinned)]
        ),
        sections=[
            workspaces.Section(name=section.name, panels=[made(panel) for panel in section.panels], is_open=True)
            for section in found
            if section.panels
        ],
    )


def account(runs: Sequence[Run]) -> tuple[str | None, str]:
    """W&B's entity and project that the newest run with a W&B logger names; povid without one."""
    for run in sorted(runs, key=lambda run: run.started, reverse=True):
        try:
            config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
            logger = config["logger"]["wandb"]
            return logger.get("entity"), str(logger["project"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            continue
    return None, "povid"


def main(arguments: Sequence[str]) -> str:
    """``python -m povid.report dashboard``: write the specification, and publish it for who is logged in.

    Returns what to print.

    Raises:
        Fault: there is no run, wandb-workspaces is missing, or W&B does not take the workspace.
    """
    parser = argparse.ArgumentParser(prog="python -m povid.report dashboard", description=__doc__)
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="folder with run folders, at any depth")
    parser.add_argument("--entity", help="W&B's user or team (default: the runs' own, or that of the login)")
    parser.add_argument("--project", help="W&B's project (default: the runs' own)")
    parser.add_argument("--name", default="POVID", help="of the workspace (default: POVID)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the specification (default: OUTPUTS/dashboard.json)")
    parser.add_argument("--offline", action="store_true", help="write the specification alone")
    options = parser.parse_args(arguments)
    runs = finished_runs(options.outputs)
    found = sections(options.outputs, runs)
    entity, project = account(runs)
    entity, project = options.entity or entity, options.project or project
    file = options.out or options.outputs / "dashboard.json"
    made = workspace(found, entity=entity or "", project=project, name=options.name)
    try:
        write_text(file, json.dumps(workspace_view(made), indent=1) + "\n")
    except OSError as error:
        raise Fault(f"{file} cannot be written ({error.strerror}); name another file with --out") from None
    if options.offline or os.environ.get("WANDB_MODE") in ("offline", "disabled") or not _logged_in():
        return f"{file}\nnot published: log in with `wandb login` and run this again"
    return f"{file}\n{_published(made, entity)}"


def _logged_in() -> bool:
    import wandb

    return wandb.login(prompt=False)


def _published(made: Any, entity: str | None) -> str:
    """Save the workspace in W&B; its address."""
    import wandb

    try:
        if not entity:
            made.entity = wandb.Api().default_entity
        return made.save().url
    except Exception as error:  # no connection, no such project, no permission: whatever W&B raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault(
            f"W&B did not take the workspace ({reason}); check --entity and --project, or write it with --offline"
        ) from error
