"""Figure 1: a radar over benchmarks, with the axes that the paper prints.

The paper's rows are those of its Table 1. CHAIR is drawn as 100 - CHAIR, as the paper does, so that outside is better
on every axis. Each axis runs from the lowest to the highest value in its panel; both stand at its ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from povid.analysis import drawing
from povid.analysis.subject import add_places, out_folder, split
from povid.fault import Fault
from povid.report.figures import COLORS, MORE
from povid.report.paper import TABLE_1
from povid.report.runs import Row, find_runs, group, summarise

# Clockwise from the top, as far as the printed figure's text tells.
AXES = {
    "science_qa.img_accuracy": "SciQA-IMG",
    "mmbench.accuracy": "MMBench",
    "pope.f1": "POPE",
    "llava_bench.overall": "LLaVA-Bench",
    "chair.CHAIR_S": "100 - CHAIR$_S$",
    "chair.CHAIR_I": "100 - CHAIR$_I$",
    "mm_vet.total": "MM-Vet",
    "mmhal.score": "MMHal",
}
TURNED = ("chair.CHAIR_S", "chair.CHAIR_I")
INNER = 0.25  # radius of an axis's lowest value
CLAIM = (
    "The paper (introduction): POVID improves on other preference tuning by 12.4 % on average (13.18 % by its Table 1)."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_places(parser)


def measure(options: argparse.Namespace) -> list[Path]:
    """Draw the paper's rows and, below the folders, ours: one panel for each model and data.

    Raises:
        Fault: there is no run, an override is given, or no runs have three of the benchmarks.
    """
    folders, overrides = split(options.places)
    if overrides:
        raise Fault(f"{overrides[0]}: the radar reads finished runs; name their folders")
    grouped = group([run for folder in folders for run in find_runs(folder)])
    panels = [("the paper's Table 1, LLaVA-1.5 (7B)", _paper())]
    for world in sorted({row.world for row in grouped}):
        ours = [row for row in grouped if row.world == world]
        inks = drawing.inks([row.name for row in ours])
        shown = [_ours(row, ink) for row, ink in zip(ours, inks, strict=True)]
        panels.append((f"model {world[0]}, data {world[1]}", shown))
    content: dict[str, Any] = {"analysis": "radar", "panels": {}}
    drawn = []
    for name, shown in panels:
        common = [key for key in AXES if all(key in values for _, _, values, _ in shown)]
        if len(common) < 3:
            if name == panels[0][0] or len(panels) > 2:
                continue
            raise Fault(
                f"the runs in {folders[0]} have {len(common)} of the radar's benchmarks in common, and it needs three: "
                f"{', '.join(AXES)}; add them to benchmarks="
            )
        ends = {key: (min(v[key] for _, _, v, _ in shown), max(v[key] for _, _, v, _ in shown)) for key in common}
        content["panels"][name] = {
            "axes": {key: {"name": AXES[key], "lowest": ends[key][0], "highest": ends[key][1]} for key in common},
            "missing": [key for key in AXES if key not in common],
            "rows": {label: {key: values[key] for key in common} | more for label, _, values, more in shown},
        }
        drawn.append((name, shown, ends))
    content["runs"] = [
        {"row": run.row, "seed": run.seed, "digest": run.results["identity"]["digest"]}
        for row in grouped
        for run in row.runs
        if "identity" in run.results
    ]
    content["caption"] = _caption(content["panels"])
    figure = drawing.canvas(3.9 * -(-len(drawn) // 2) + 0.4)
    drawing.title(
        figure,
        "Overall performance: outside is better on every axis",
        "inner ring: the lowest value in the panel; outer ring: the highest",
    )
    across = min(len(drawn), 2)
    for place, (name, shown, ends) in enumerate(drawn, 1):
        _radar(figure.add_subplot(-(-len(drawn) // across), across, place, projection="polar"), name, shown, ends)
    return drawing.save(figure, out_folder(options) / "radar.png", content)


Line = tuple[str, str, dict[str, float], dict[str, Any]]
"""Label, colour, value on each axis, and what else belongs to the row."""


def _value(key: str, score: float) -> float:
    return round(100 - score, 6) if key in TURNED else score


def _paper() -> list[Line]:
    inks = (COLORS["none"], *MORE[:3], COLORS["both"])
    return [
        (row.name, ink, {key: _value(key, row.scores[key]) for key in AXES}, {"printed": True})
        for row, ink in zip(TABLE_1, inks, strict=True)
    ]


def _ours(row: Row, ink: str) -> Line:
    values = {}
    for key in AXES:
        score = summarise(row, key).mean
        if score is not None:
            values[key] = _value(key, score)
    more = {"runs": len(row.runs)} | {key: summarise(row, f"chair.{key}").mean for key in ("coverage", "words")}
    return row.label.replace("_", " "), ink, values, more


def _radar(axes: Any, name: str, shown: Sequence[Line], ends: Mapping[str, tuple[float, float]]) -> None:
    angles = np.linspace(0, 2 * np.pi, len(ends), endpoint=False)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    dashes = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
    for number, (label, ink, values, _) in enumerate(shown):
        radii = [
            INNER + (1 - INNER) * ((values[key] - low) / (high - low) if high > low else 1.0)
            for key, (low, high) in ends.items()
        ]
        best = number == len(shown) - 1 if name.startswith("the paper") else label == "both"
        axes.plot(
            [*angles, angles[0]],
            [*radii, radii[0]],
            color=ink,
            ls="-" if best else dashes[number % 5],
            lw=2.4 if best else 1.4,
            label=label,
        )
        if best:
            axes.fill([*angles, angles[0]], [*radii, radii[0]], color=ink, alpha=0.1, lw=0)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([INNER, 0.625, 1.0], [])
    axes.set_xticks(angles, [f"{AXES[key]}\n{low:.4g} to {high:.4g}" for key, (low, high) in ends.items()], fontsize=8)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = np.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.tick_params(axis="x", pad=1)
    axes.grid(alpha=0.35)
    axes.spines["polar"].set_visible(False)
    axes.set_title(name, fontsize=9.5, pad=14)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8.5, frameon=False)


def _caption(panels: Mapping[str, Any]) -> str:
    said = (
        "Benchmarks as in Figure 1 of the paper: 100 - CHAIR in place of CHAIR, outside is better. The figure's own "
        f"scale is not at hand, so each axis runs from the lowest to the highest value in its panel. {CLAIM} "
    )
    for name, panel in panels.items():
        best = {key: max(panel["rows"], key=lambda row: panel["rows"][row][key]) for key in panel["axes"]}
        leads = {
            row: [panel["axes"][key]["name"] for key in best if best[key] == row]
            for row in dict.fromkeys(best.values())
        }
        won = "; ".join(f"{row} leads in {', '.join(names)}" for row, names in leads.items()).replace("$", "")
        said += f"In {name}: {won}."
        runs = [str(row["runs"]) for row in panel["rows"].values() if "runs" in row]
        if runs:
            covered = ", ".join(
                f"{label} {row['coverage']:.1f}" for label, row in panel["rows"].items() if row["coverage"]
            )
            said += f" Seeds per row: {', '.join(runs)}. Coverage, without which CHAIR says little: {covered}."
        if panel["missing"]:
            said += f" Not scored: {', '.join(AXES[key] for key in panel['missing'])}."
        said = said.replace("$", "") + " "
    return said.strip()
