"""What conf/arena.yaml says: which arms meet, how the settings of each are chosen, and where they are compared.

Every arm tries the same grid on the tuning split. One rule picks a setting for each from those trials alone; with it
the arm runs in every world and with every seed, and answers the evaluation split.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from povid.fault import Fault, validated
from povid.files import read_json
from povid.report.runs import WORLD, is_number, lookup
from povid.run.identity import digest

BASE = "base"
NAME = r"^[a-z0-9][a-z0-9_]*$"


def _overrides(text: str) -> str:
    reserved = {"row", "resume", "outputs", "hydra.run.dir", "hydra.sweep.dir", "seed", WORLD}
    for override in shlex.split(text):
        key, equals, _ = override.lstrip("+~").partition("=")
        if override.startswith("-") or (not equals and not override.startswith("~")):
            raise ValueError(f"{override!r} is not an override of train.py (KEY=VALUE)")
        if key in reserved:
            raise ValueError(f"{key} is set by the arena; leave it out")
    return text


Name = Annotated[str, Field(pattern=NAME)]
Overrides = Annotated[str, AfterValidator(_overrides)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(lambda seeds: _once(seeds))]


def _once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"found {seeds}, needed numbers that differ")
    return seeds


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Choice(_Model):
    """The rule: of the trials whose ``guard`` lies at most ``within`` points below the base's, the best in ``score``.

    If none does, the one with the highest guard. The earlier trial wins a tie.
    """

    score: str
    better: Literal["low", "high"]
    guard: str
    within: Annotated[float, Field(ge=0)]


class Tuning(_Model):
    """Where every arm tries the ``grid``: overrides, and the seed of the world and of the run."""

    grid: Annotated[list[Overrides], Field(min_length=1)]
    overrides: Overrides
    world: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    choice: Choice


class Evaluation(_Model):
    """Where the arms are compared: every world with every seed."""

    overrides: Overrides
    worlds: Seeds
    seeds: Seeds


class Plan(_Model):
    """An arena. ``arms`` are overrides of train.py by group and name; ``reference`` is the arm that others are held
    against, and ``base`` the model before training."""

    common: Overrides
    base: Overrides
    reference: Name
    arms: Annotated[dict[str, dict[Name, Overrides]], Field(min_length=1)]
    tuning: Tuning
    evaluation: Evaluation

    @property
    def names(self) -> list[str]:
        return [name for group in self.arms.values() for name in group]

    @property
    def group_of(self) -> dict[str, str]:
        return {name: group for group, members in self.arms.items() for name in members}

    def overrides(self, arm: str) -> list[str]:
        text = self.base if arm == BASE else self.arms[self.group_of[arm]][arm]
        return [*shlex.split(self.common), *shlex.split(text), f"row={arm}"]


def read_plan(file: Path) -> Plan:
    """The plan in a YAML file. Raises Fault with everything that is wrong with it."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise Fault(f"{file} cannot be read ({error.strerror}); name the plan of an arena") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Fault(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise Fault(f"{file} holds no mapping; conf/arena.yaml shows what a plan is")
    plan = validated(Plan, found, str(file))
    names = plan.names
    if twice := [name for name in names if names.count(name) > 1 or name == BASE]:
        raise Fault(f"{file}: {twice[0]} names more than one arm, or the base; give each arm its own name")
    if plan.reference not in names:
        raise Fault(f"{file}: reference is {plan.reference!r}, which is no arm; the arms are {', '.join(names)}")
    if (plan.tuning.world in plan.evaluation.worlds) and plan.tuning.overrides == plan.evaluation.overrides:
        raise Fault(f"{file}: settings would be chosen where the arms are compared; change tuning.overrides or worlds")
    return plan


@dataclass(frozen=True)
class Job:
    """One run of train.py in ``folder``: ``arm``, and what ``label`` calls the trial or the world and seed."""

    arm: str
    label: str
    overrides: tuple[str, ...]
    folder: Path
    world: int
    seed: int

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").exists()

    def scores(self) -> dict[str, Any]:
        """The benchmarks' scores in its results.json."""
        cure = "move the folder away and run the arena again"
        return read_json(self.folder / "results.json", dict, cure, ("benchmarks",))["benchmarks"]


def _job(out: Path, phase: str, arm: str, label: str, overrides: Sequence[str], world: int, seed: int) -> Job:
    """The folder is named for everything that the job is told, so that another plan never finds this one's results."""
    told = (*overrides, f"{WORLD}={world}", f"seed={seed}")
    return Job(arm, label, told, out / phase / arm / f"{label}_{digest(told)[:8]}", world, seed)


def trials(plan: Plan, out: Path) -> dict[str, list[Job]]:
    """The base and every arm at every point of the grid, on the tuning split."""
    tuning = plan.tuning

    def job(arm: str, label: str, point: str = "") -> Job:
        told = [*plan.overrides(arm), *shlex.split(tuning.overrides), *shlex.split(point)]
        return _job(out, "tuning", arm, label, told, tuning.world, tuning.seed)

    arms = {arm: [job(arm, f"trial{n}", point) for n, point in enumerate(tuning.grid, 1)] for arm in plan.names}
    return {BASE: [job(BASE, "base")]} | arms


def contests(plan: Plan, out: Path, chosen: Mapping[str, int]) -> dict[str, list[Job]]:
    """The base in every world, and every arm at its ``chosen`` point of the grid in every world with every seed."""
    evaluation, found = plan.evaluation, {}
    for arm in (BASE, *plan.names):
        point = shlex.split(plan.tuning.grid[chosen[arm]]) if arm != BASE else []
        told = [*plan.overrides(arm), *shlex.split(evaluation.overrides), *point]
        seeds = evaluation.seeds if arm != BASE else evaluation.seeds[:1]  # nothing of the base depends on the seed
        found[arm] = [
            _job(out, "evaluation", arm, f"world{world}_seed{seed}", told, world, seed)
            for world, seed in itertools.product(evaluation.worlds, seeds)
        ]
    return found


def choose(plan: Plan, tried: Mapping[str, Sequence[Job]]) -> tuple[dict[str, int], dict[str, Any]]:
    """For each arm the index of its setting in the grid, and what the trials scored.

    Raises:
        Fault: a trial lacks a score that the rule reads.
    """
    rule = plan.tuning.choice

    def read(job: Job) -> tuple[float, float]:
        scores = job.scores()
        values = [lookup(scores, name) for name in (rule.score, rule.guard)]
        for name, value in zip((rule.score, rule.guard), values):
            if not is_number(value):
                raise Fault(f"{job.folder / 'results.json'} holds no {name}, by which settings are chosen")
        return values[0], values[1]

    (base,) = tried[BASE]
    floor = read(base)[1] - rule.within
    chosen: dict[str, int] = {}
    record: dict[str, Any] = {"rule": rule.model_dump(), "base": dict(zip(("score", "guard"), read(base))), "arms": {}}
    for arm in plan.names:
        found = [read(job) for job in tried[arm]]
        sign = 1 if rule.better == "low" else -1
        fit = [i for i, (_, guard) in enumerate(found) if guard >= floor]
        chosen[arm] = (
            min(fit, key=lambda i: sign * found[i][0]) if fit else max(range(len(found)), key=lambda i: found[i][1])
        )
        record["arms"][arm] = {
            "chosen": plan.tuning.grid[chosen[arm]],
            "guarded": bool(fit),
            "trials": [
                {"setting": point, "score": score, "guard": guard}
                for point, (score, guard) in zip(plan.tuning.grid, found)
            ],
        }
    return chosen, record
