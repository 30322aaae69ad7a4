"""The arena as one table (Markdown, CSV and JSON) and one figure, CHAIR_I against coverage."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from povid.arena.plan import BASE, Plan
from povid.arena.result import FIGURES, MATCHED, Interval, Standing
from povid.files import write_json, write_text
from povid.report.compare import LEVEL
from povid.report.figures import ALL, MORE, canvas, save
from povid.report.tables import COLLAPSE

DECIMALS = {"POPE F1": 2, "F1 of valid": 2}
ARROWS = {"CHAIR_S": " ↓", "CHAIR_I": " ↓", "POPE F1": " ↑", "F1 of valid": " ↑", MATCHED: " ↓"}
WITH_INTERVAL = ("CHAIR_I", "coverage", "POPE F1")
INKS = (MORE[2], "#d55e00", "#757575", *MORE)


def write(
    plan: Plan, found: Sequence[Standing], tuned: Mapping[str, Any], out: Path, resamples: int, drop: float = COLLAPSE
) -> list[Path]:
    """Write ``arena.md``, ``.csv``, ``.json`` and ``.png`` into ``out``; return the files."""
    less = says_less(found, drop)
    content = {
        "plan": plan.model_dump(),
        "tuning": tuned,
        "resamples": resamples,
        "level": LEVEL,
        "standings": [
            {
                "arm": one.arm,
                "group": one.group,
                "setting": one.setting,
                "steps": one.steps,
                "runs": one.runs,
                "says_less": one.arm in less,
                "figures": {title: vars(interval) for title, interval in one.figures.items()},
                f"minus {plan.reference}": {title: vars(interval) for title, interval in one.differences.items()},
            }
            for one in found
        ],
    }
    return [
        write_text(out / "arena.md", markdown(plan, found, tuned, less, resamples)),
        write_text(out / "arena.csv", comma_separated(found)),
        write_json(out / "arena.json", content),
        draw(plan, found, out / "arena.png"),
    ]


def says_less(found: Sequence[Standing], drop: float = COLLAPSE) -> set[str]:
    """The arms whose coverage lies more than ``drop`` points below the base's."""
    base = next(one for one in found if one.arm == BASE)
    return {one.arm for one in found if base.figures["coverage"].value - one.figures["coverage"].value > drop}


def markdown(plan: Plan, found: Sequence[Standing], tuned: Mapping[str, Any], less: set[str], resamples: int) -> str:
    """One table, then what its figures mean."""
    head = ["arm", "setting", "steps", *(title + ARROWS.get(title, "") for title in FIGURES)]
    head.append(f"{MATCHED}, minus {plan.reference}{ARROWS[MATCHED]}")
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    group = ""
    for one in found:
        if one.group != group:
            group = one.group
            lines.append([f"*{group.replace('_', ' ')}*", *[""] * (len(head) - 1)])
        cells = [shown(one.figures[title], title, title in WITH_INTERVAL) for title in FIGURES]
        matched = one.differences.get(MATCHED)
        won = matched is not None and matched.high < 0 and one.arm not in less
        text = shown(matched, MATCHED, True, "+") if matched else "–"
        name = one.arm + (" †" if one.arm in less else "")
        lines.append([name, one.setting, str(one.steps), *cells, f"**{text}**" if won else text])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return table + "\n\n" + "".join(f"- {note}\n" for note in notes(plan, found, tuned, less, resamples))


def notes(plan: Plan, found: Sequence[Standing], tuned: Mapping[str, Any], less: set[str], resamples: int) -> list[str]:
    """What the figures mean and where they come from, one sentence or two each."""
    evaluation, rule = plan.evaluation, plan.tuning.choice
    contested = sum(bool(one.differences) and one.arm != BASE for one in found)
    lucky = contested * (1 - LEVEL) / 2
    texts = [
        f"Means over {len(evaluation.worlds)} worlds (data.prepare.seed={_listed(evaluation.worlds)}) and "
        f"{len(evaluation.seeds)} seeds ({_listed(evaluation.seeds)}), in brackets {100 * LEVEL:.0f} % intervals from "
        f"{resamples:,} resamples of worlds, seeds and pictures. All but steps are percent, and differences points.",
        f"Settings: every arm tried the same {len(plan.tuning.grid)} on the tuning pictures of world "
        f"{plan.tuning.world}. Of those with {rule.guard} at most {rule.within:g} points below the base's, the one "
        f"with the {'lowest' if rule.better == 'low' else 'highest'} {rule.score} was taken.",
        f"{MATCHED}: the captions of the run that names more true objects are cut, all after the same number of "
        "mentions, until both name the same share. Bold: the interval lies below 0. If all "
        f"{contested} arms were as good as {plan.reference}, {lucky:.1f} would be bold by chance.",
        "F1 of valid: without the answers that say neither yes nor no, which POPE's parser takes for yes. Repeats: "
        "mentions of an object that the caption has named before.",
    ]
    if less:
        texts.append(
            f"† {_listed(sorted(less))}: coverage more than {COLLAPSE:g} points below the base's; a lower CHAIR is no "
            "improvement by itself."
        )
    if unguarded := [arm for arm, one in tuned["arms"].items() if not one["guarded"]]:
        texts.append(f"No setting of {_listed(unguarded)} kept {rule.guard}; the one that kept most of it was taken.")
    steps = {one.steps for one in found if one.arm != BASE}
    if len(steps) > 1:
        texts.append(f"The arms differ in their numbers of optimization steps: {_listed(sorted(steps))}.")
    return texts


def comma_separated(found: Sequence[Standing]) -> str:
    """Every figure and difference with its limits, unrounded, one a line."""
    sink = io.StringIO()
    sheet = csv.writer(sink, lineterminator="\n")
    sheet.writerow(["arm", "group", "setting", "steps", "runs", "figure", "kind", "value", "low", "high"])
    for one in found:
        for kind, table in (("score", one.figures), ("difference", one.differences)):
            for title, interval in table.items():
                place = [one.arm, one.group, one.setting, one.steps, one.runs, title, kind]
                sheet.writerow([*place, interval.value, interval.low, interval.high])
    return sink.getvalue()


def draw(plan: Plan, found: Sequence[Standing], file: Path) -> Path:
    """CHAIR_I over coverage: a numbered mark for each arm with both intervals, a colour for each group."""
    figure = canvas(9.6, 6.2)
    axes = figure.add_subplot()
    inks = dict(zip(plan.arms, INKS * len(plan.arms)))
    group = ""
    for number, one in enumerate(found):
        if one.group != group:
            group = one.group
            axes.plot([], [], " ", label=group.replace("_", " "))  # a heading in the legend
        across, up = one.figures["coverage"], one.figures["CHAIR_I"]
        ink = inks.get(one.group, ALL)
        axes.errorbar(
            [across.value],
            [up.value],
            xerr=[[across.value - across.low], [across.high - across.value]],
            yerr=[[up.value - up.low], [up.high - up.value]],
            color=ink,
            alpha=0.35,
            lw=1,
            zorder=1,
        )
        label = f"{number}  {one.arm}"
        axes.plot([across.value], [up.value], "o", color=ink, ms=13, mec="white", mew=0.8, zorder=2, label=label)
        axes.annotate(
            str(number), (across.value, up.value), ha="center", va="center", color="white", fontsize=7.5, zorder=3
        )
    axes.set_xlabel("coverage: true objects mentioned, % (higher is better)")
    axes.set_ylabel("CHAIR$_I$: hallucinated mentions, % (lower is better)")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False, markerscale=0.6)
    worlds, seeds = plan.evaluation.worlds, plan.evaluation.seeds
    figure.suptitle(
        f"Hallucination against coverage: lower right is better\n{len(worlds)} worlds, {len(seeds)} seeds; bars are "
        f"{100 * LEVEL:.0f} % intervals",
        fontsize=11,
    )
    return save(figure, file)


def shown(interval: Interval, title: str, limits: bool, sign: str = "") -> str:
    """A value as the table has it, with its interval in brackets."""
    form = f"{sign}.{DECIMALS.get(title, 1)}f"
    text = f"{interval.value:{form}}"
    if limits:
        text += f" [{interval.low:{form}}, {interval.high:{form}}]"
    return text.replace("-", "−")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
