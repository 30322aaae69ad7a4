"""Read run folders and group the runs into rows whose scores may be averaged.

The runs of a row differ in the seed alone: they have the same identity (``povid.run.identity``) without the seed. Where
every row of a model and a data set has been run in the same worlds (WORLD), they may differ in the world too. The
parts in which the identities of two rows of the same name differ become part of their labels. A results.json of an
earlier version has no identity; such runs are told apart by what else they recorded, and by their command lines.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from povid.benchmarks.benchmark import Column
from povid.fault import Fault

PAPER_ROWS = ("none", "text", "noise", "both")
LAST_STAGE = {"text": "1", "noise": "2", "both": "2"}
RECORDED = ("objective", "noise", "model", "data", "experiment", "decoding")
# The settings among the keys of a stage in results.json; the other keys (times, folders) differ between seeds.
STAGE_SETTINGS = ("steps", "records", "batch_size")
# Overrides that results.json repeats, or that cannot change what is learned or scored.
OVERRIDES_ELSEWHERE = {
    "seed",
    "row",
    "ablation",
    "dispreference",
    "stage",
    "model",
    "data",
    "objective",
    "noise",
    "experiment",
    "benchmarks",
    "init_from",
    "outputs",
    "resume",
    "samples",
    "generation.batch_size",
    "data.workers",
    "data.cache_mb",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
}
# Parts of an identity that are digests: in a label the settings that they come from stand for them.
DIGESTS = {"records", "pictures", "texts", "truth", "weights", "starts_from"}
WORLD = "data.prepare.seed"  # the seed of data that are made: what differs with it alone is another world
LONG = 60  # characters of a difference that fit into a label
GROUPS_ELSEWHERE = {"hydra", "logger", "launcher", "judge"}


@dataclass(frozen=True)
class Run:
    """One readable results.json."""

    file: Path
    row: str
    seed: Any
    started: str
    settings: dict[str, str]  # dotted name to text: everything but the seed that may distinguish this run
    results: dict[str, Any]
    columns: tuple[Column, ...] = ()  # what its benchmarks say about their scores
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # where content comes from: settings, and places

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def benchmarks(self) -> dict[str, Any]:
        return self.results["benchmarks"]

    @property
    def prepared(self) -> str | None:
        """The seed with which its data were made; None for data that were not made."""
        return self.names.get("settings", {}).get(WORLD)

    @property
    def painted(self) -> bool:
        """Whether its pictures were painted by this project; of a run of an earlier version its data's name says so."""
        made_by = self.names.get("settings", {}).get("data.prepare._target_", "")
        return made_by.startswith("povid.scenes.") if self.names else self.world[1] == "scenes"

    @property
    def world(self) -> tuple[str, str]:
        """(model, data): only rows of the same world are compared."""
        model, data = (self.settings.get(key) or self.settings.get(f"{key}.name", "?") for key in ("model", "data"))
        return model, data

    @property
    def limits(self) -> dict[str, dict[str, int]]:
        """By benchmark, what a limit left of its questions: {"limit", "asked", "of"}; only those that it shortened."""
        return {name: scores["limit"] for name, scores in self.benchmarks.items() if _is_limit(lookup(scores, "limit"))}

    @property
    def limit(self) -> str:
        """The limit under which the benchmarks were asked, as its override; "" if all questions were."""
        found = {name: limit["limit"] for name, limit in self.limits.items()}
        if len(set(found.values())) > 1:
            return ", ".join(f"benchmarks.{name}.limit={count}" for name, count in found.items())
        return "".join(f"benchmarks.limit={count}" for count in set(found.values()))


def _is_limit(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), int) for key in ("limit", "asked", "of"))


@dataclass
class Row:
    """Runs that differ in the seed alone, or in seed and world, the newest of each, and the ``settings`` they share.

    ``difference`` distinguishes it from rows of the same name; ``label`` is its name with the difference, or with a
    number that a remark explains if the difference is long.
    """

    name: str
    runs: list[Run]
    settings: dict[str, str]
    difference: str = ""
    label: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def world(self) -> tuple[str, str]:
        return self.runs[0].world

    @property
    def limit(self) -> str:
        return self.runs[0].limit

    @property
    def steps(self) -> int:
        """Optimizer steps over all stages; 0 if the run does not record them."""
        stages = self.runs[0].results.get("stages")
        found = [stage.get("steps") for stage in stages.values()] if isinstance(stages, dict) else []
        return sum(steps for steps in found if isinstance(steps, int))

    def by_world(self) -> dict[str | None, Row]:
        """Its runs in each world by themselves."""
        found: dict[str | None, Row] = {}
        for run in self.runs:
            found.setdefault(run.prepared, Row(self.name, [], self.settings)).runs.append(run)
        return found

    @property
    def whole(self) -> bool:
        """Whether its runs trained all stages of the ablation that names the row, and started from no other adapter."""
        return "stage" not in self.settings and "adapters" not in self.settings


def find_runs(outputs: Path, skipped: list[str] | None = None) -> list[Run]:
    """Find every run below ``outputs``, at any depth; an unreadable results.json is skipped.

    A sentence about it goes to ``skipped``, or to stderr if there is none.

    Raises:
        Fault: ``outputs`` is not a folder or holds no readable results.json.
    """
    outputs = Path(outputs)
    if not outputs.is_dir():
        raise Fault(f"{outputs} is not a folder; name the folder that training wrote its runs to")
    files = {file.resolve(): file for file in sorted(outputs.rglob("results.json"), reverse=True)}
    runs = []
    for file in sorted(files.values()):
        try:
            runs.append(read(file))
        except (OSError, ValueError) as error:
            if skipped is None:
                print(f"warning: skipped {file}: {error}", file=sys.stderr)
            else:
                skipped.append(f"{file}: {error}")
    if not runs:
        found = f"{len(files)} results.json, none of them readable" if files else "no results.json"
        raise Fault(f"{outputs} holds {found}; run python train.py first or name another folder")
    return runs


def read(file: Path) -> Run:
    """The run of a results.json. Raises ValueError for one that no finished run wrote, with the reason."""
    if not file.is_file():
        raise ValueError("it is not a file; start that run again")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error}); start that run again") from error
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), dict):
        raise ValueError("'benchmarks' is missing, so the run has not finished")
    if not isinstance(results.get("row"), str) or not results["row"]:
        raise ValueError("'row', the row of the table that the run belongs to, is missing")
    row, started = results["row"], str(results.get("started", ""))
    columns = _columns(results.get("columns", []))
    identity = results.get("identity")
    if not isinstance(identity, dict):
        return Run(file, row, results.get("seed"), started, _settings(row, results, file), results, columns)
    try:
        settings = _identity_settings(row, results, identity["row"])
        names = {kind: _texts(identity["named"][kind]) for kind in ("settings", "places")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'identity' is not what a run writes ({error!r}); start that run again") from error
    return Run(file, row, results.get("seed"), started, settings, results, columns, names)


def _columns(entries: Any) -> tuple[Column, ...]:
    try:
        columns = tuple(Column(**entry) for entry in entries)
    except TypeError as error:
        raise ValueError(f"'columns' is not a list of table columns ({error})") from error
    for column in columns:
        texts = (column.key, column.title, column.subscript)
        fine = isinstance(column.decimals, int) and 0 <= column.decimals <= 9
        if column.better not in ("low", "high", None) or not fine or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"'columns' has {column!s:.200}; 'better' is low, high or null, 'decimals' 0 to 9, the rest text"
            )
    return columns


def _identity_settings(row: str, results: dict[str, Any], parts: dict[str, Any]) -> dict[str, str]:
    """The parts of a run's identity without its seed, the names of its world, and which stages it trained itself."""
    found = {"model": str(results.get("model")), "data": str(results.get("data"))} | _texts(parts)
    stages = results.get("stages") or {}
    for number, stage in stages.items():
        found[f"stages.{number}.batch_size"] = str(stage["batch_size"])  # what "auto" came to
    if stages:
        found.pop("adapters", None)  # the stages' own parts say how they were made
    return found | _trained(str(results.get("ablation", row)), results, stages)


def _texts(parts: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in parts.items():
        _flatten(value, key, found)
    return found


def _trained(ablation: str, results: dict[str, Any], stages: Any) -> dict[str, str]:
    """What marks a run that did not train all stages of its ablation."""
    found = {}
    if ablation == "both" and isinstance(stages, dict) and "2" in stages and "1" not in stages:
        found["stage 1"] = "of another run"
    last, stage = LAST_STAGE.get(ablation), str(results.get("stage", "all"))
    if last and stage not in ("all", last, "None"):
        found["stage"] = stage
    return found


def _settings(row: str, results: dict[str, Any], file: Path) -> dict[str, str]:
    """Everything recorded that may distinguish a run, except what cannot affect its row, such as unused noise."""
    flat: dict[str, str] = {}
    for key in RECORDED:
        _flatten(results.get(key), key, flat)
    if results.get("dispreference") not in (None, "given"):
        flat["dispreference"] = str(results["dispreference"])
    settings = results.get("settings")
    for key, value in settings.items() if isinstance(settings, dict) else ():
        _flatten(value, key, flat)
    for key in [
        key for key in flat if key == "objective.name" or (key.startswith("stages.") and key.endswith(".name"))
    ]:
        del flat[key]
    stages = results.get("stages")
    for number, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict):
            _flatten({key: value for key, value in stage.items() if key in STAGE_SETTINGS}, f"stages.{number}", flat)
    for override in _overrides(file.parent):
        name, _, value = override.lstrip("+~").partition("=")
        name = (name.partition("@")[2] or name).replace("/", ".")  # a group mounted at a key: stages@stages.1
        if name not in OVERRIDES_ELSEWHERE and name.split(".")[0] not in GROUPS_ELSEWHERE:
            flat.setdefault(name, value)
    ablation = str(results.get("ablation", row))
    if ablation == "none":  # nothing was trained, so adapters come from another run
        _flatten(results.get("adapters"), "adapters", flat)
    flat |= _trained(ablation, results, stages)
    untouched = {
        "none": ("objective", "noise", "experiment", "stages", "trainer"),
        "text": ("noise", "stages.2"),
        "noise": ("stages.1",),
    }.get(row, ())
    return {
        key: value
        for key, value in flat.items()
        if not any(key == part or key.startswith(part + ".") for part in untouched)
    }


def _flatten(value: Any, key: str, into: dict[str, str]) -> None:
    """Add leaves as text under their dotted names, except null and empty lists, which mean "not set"."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}", into)
    elif value is not None and value != []:
        into[key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _overrides(folder: Path) -> list[str]:
    """Hydra's record of the command line, if the run has one."""
    file = folder / ".hydra" / "overrides.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def group(runs: Iterable[Run], ignore: tuple[str, ...] = ()) -> list[Row]:
    """Group runs that agree in their row's name, their limit and in every setting except those in ``ignore``.

    A seed that was run twice with the same settings counts once, by its newest run, with a remark on the row. Runs in
    several worlds become one row where every row of that model and data was run in the same worlds.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    runs = list(runs)
    for run in runs:
        settings = {
            key: value
            for key, value in run.settings.items()
            if key not in ignore and not (key.startswith(("decoding.", "benchmarks.")) and _only_some(key, run, runs))
        }
        groups[run.row, run.limit, tuple(sorted(settings.items()))].append(run)
    rows = _over_worlds([_row(name, members, dict(settings)) for (name, _, settings), members in groups.items()])
    _label(rows, ignore)
    order = {name: place for place, name in enumerate(PAPER_ROWS)}
    return sorted(
        rows, key=lambda row: (row.world, row.limit, order.get(row.name, len(order)), row.name, row.difference)
    )


def _over_worlds(rows: list[Row]) -> list[Row]:
    """Join rows that differ in the world alone, unless some row of the same model and data lacks one of the worlds."""
    alike: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        content = DIGESTS - {"weights"} - (set() if row.whole else {"starts_from"})
        settings = {key: value for key, value in row.settings.items() if key.rpartition(".")[2] not in content}
        settings |= {key: value for key, value in row.runs[0].names.get("settings", {}).items() if key != WORLD}
        alike[(*row.world, row.limit), row.name, tuple(sorted(settings.items()))].append(row)
    ran: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)  # two contents of one world stand twice in a list
    for (world, *_), members in alike.items():
        ran[world].append(sorted(str(row.runs[0].prepared) for row in members))
    joined = []
    for (world, *_), members in alike.items():
        first = ran[world][0]
        same = len(set(first)) == len(first) and all(worlds == first for worlds in ran[world])
        joined += [_joined(members)] if same else members
    return joined


def _joined(members: list[Row]) -> Row:
    first, *others = sorted(members, key=lambda row: (len(str(row.runs[0].prepared)), str(row.runs[0].prepared)))
    if not others:
        return first
    shared = {k: v for k, v in first.settings.items() if all(other.settings.get(k) == v for other in others)}
    seeds = ", ".join(str(row.runs[0].prepared) for row in (first, *others))
    remarks = [f"mean and spread over seeds and over {len(members)} worlds ({WORLD}={seeds})"]
    for row in (first, *others):
        remarks += [f"{remark} (world {row.runs[0].prepared})" for remark in row.remarks]
    return Row(first.name, [run for row in (first, *others) for run in row.runs], shared, remarks=remarks)


def _only_some(key: str, run: Run, runs: list[Run]) -> bool:
    """Whether runs of the same row are without this setting and the others agree in it: those without answered fewer
    benchmarks, and nobody disagrees."""
    alike = [other.settings.get(key) for other in runs if (other.row, other.world) == (run.row, run.world)]
    return None in alike and len({value for value in alike if value is not None}) == 1


def _row(name: str, runs: list[Run], settings: dict[str, str]) -> Row:
    newest: dict[Any, Run] = {}
    older, apart = 0, False
    for run in sorted(runs, key=lambda run: (run.started, str(run.file))):
        key = run.file if run.seed is None else str(run.seed)
        older += key in newest
        apart |= key in newest and _contradict(newest[key], run)
        newest[key] = run
    row = Row(name, sorted(newest.values(), key=lambda run: (str(run.seed).zfill(12), str(run.file))), settings)
    if older:
        differ = ", although their scores differ" if apart else ""
        row.remarks.append(f"{older} older run{'s' * (older > 1)} with the same seed and settings not counted{differ}")
    versions: dict[str, set[str]] = defaultdict(set)
    for run in row.runs:
        found = run.results.get("versions")
        for package, version in found.items() if isinstance(found, dict) else ():
            versions[package].add(str(version))
    mixed = [
        f"{package} {' and '.join(sorted(found))}" for package, found in sorted(versions.items()) if len(found) > 1
    ]
    if mixed:
        row.remarks.append(f"its runs were made with different versions: {', '.join(mixed)}")
    return row


def _contradict(one: Run, other: Run) -> bool:
    """Whether two runs have different values of a score that tables show."""
    both = [[lookup(run.benchmarks, column.key) for run in (one, other)] for column in one.columns]
    return any(a != b for a, b in both if a is not None and b is not None)


def _label(rows: list[Row], ignore: tuple[str, ...]) -> None:
    """Set ``difference`` and ``label`` of each row by comparing it with the others of its name, world and limit."""
    siblings: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        siblings[row.name, row.limit, row.world if "data" not in ignore else row.world[0]].append(row)
    for members in siblings.values():
        keys = sorted({key for row in members for key in row.settings})
        apart = [key for key in keys if len({row.settings.get(key) for row in members}) > 1]
        values = [row.settings for row in members]
        if digests := [key for key in apart if key.rpartition(".")[2] in DIGESTS]:
            apart, values = _in_words(members, [key for key in apart if key not in digests], digests)
        for row, value in zip(members, values):
            parts = [
                f"{key}={value.get(key, 'default')}"
                for key in apart
                if key != "stage" and not ("stage 1" in apart and key.startswith("stages.1."))
            ]
            parts = [part.replace("stage 1=", "stage 1 ") for part in parts if part != "stage 1=default"]
            if "stage" in row.settings:
                parts.append(f"stage {row.settings['stage']} only")
            row.difference = ", ".join(parts)
        if (
            apart
            and all(key.startswith("stages.") for key in apart)
            and len({row.steps for row in members}) == len(members)
        ):
            for row in members:
                row.difference = f"{row.steps} steps"
        short = all(len(row.difference) <= LONG for row in members)
        for number, row in enumerate(sorted(members, key=lambda row: row.difference), 1):
            apart_by = row.difference if short else f"setting {number}"
            row.label = f"{row.name} ({apart_by})" if row.difference else row.name
            if not short:
                row.remarks.insert(0, f"{apart_by} is {row.difference}")


def _in_words(members: list[Row], apart: list[str], digests: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """The keys that distinguish rows whose digests differ, with the settings that the digests come from in their place.

    Where no setting differs, the places that content was read from stand there; where not even those differ, and
    nothing else does, the digests themselves.
    """
    for kind in ("settings", "places"):
        named = [row.runs[0].names.get(kind, {}) for row in members]
        keys = sorted({key for names in named for key in names})
        found = [key for key in keys if len({names.get(key) for names in named}) > 1]
        if found or apart:
            values = [{**names, **row.settings} for row, names in zip(members, named)]
            return sorted({*apart, *found}), values
    return digests, [row.settings for row in members]


@dataclass(frozen=True)
class Summary:
    """One score over the seeds of a row: its ``mean``, sample standard deviation ``sd`` and standard error ``se`` (both
    NaN for a single run) over the ``n`` runs that have it. ``mean`` is None if it is missing, for the given ``reason``.
    """

    mean: float | None
    sd: float = math.nan
    se: float = math.nan
    n: int = 0
    reason: str = ""
    remark: str = ""


# Scores are averaged only over runs that agree in these keys of a benchmark, at any depth.
SAME_TEST = ("judge", "captions", "questions", "limit")


def lookup(scores: Any, path: str) -> Any:
    """``scores["a"]["b"]`` for the path ``a.b``; None if a part is missing."""
    for part in path.split("."):
        scores = scores.get(part) if isinstance(scores, dict) else None
    return scores


def summarise(row: Row, score: str, corrected: bool = False) -> Summary:
    """Mean and spread over the seeds of ``row`` of the score ``benchmark.score`` (its path in results.json).

    ``corrected``: use the score without the official script's mistake, which a run records if it differs.
    """
    benchmark, _, key = score.partition(".")
    values, reasons, tests = [], [], []
    for run in row.runs:
        found = run.benchmarks.get(benchmark)
        value = lookup(found, key)
        if corrected and is_number(lookup(found, f"corrected.{key}")):
            value = lookup(found, f"corrected.{key}")
        if is_number(value):
            values.append(float(value))
            decoding = lookup(run.results, f"decoding.{benchmark}")
            tests.append(_test(found) | {"decoding": json.dumps(decoding, sort_keys=True)})
        else:
            reasons.append(_reason(benchmark, key, found, value))
    apart = []
    for part in dict.fromkeys(part for test in tests for part in test):
        kinds = {test.get(part, "unknown") for test in tests}
        if len(kinds) > 1:
            apart.append(f"{part} {' and '.join(sorted(kinds))}")
    if apart:
        return Summary(None, reason=f"{benchmark}: runs differ in {'; '.join(apart)} and are not averaged")
    reasons = sorted(set(reasons))
    if not values:
        return Summary(None, reason="; ".join(reasons))
    mean = math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) if values[1:] else math.nan
    remark = f"{benchmark}: {len(values)} of {len(row.runs)} runs ({'; '.join(reasons)})" if reasons else ""
    return Summary(mean, sd, sd / math.sqrt(len(values)), len(values), remark=remark)


def _test(scores: dict[str, Any], path: str = "") -> dict[str, str]:
    """The entries of SAME_TEST among the scores of a benchmark, by path."""
    found = {}
    for key, value in scores.items():
        if key in SAME_TEST:
            found[path + key] = str(value)
        elif isinstance(value, dict) and key != "corrected":
            found |= _test(value, f"{path}{key} ")
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, of which a float can hold the square and the sum over runs."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _reason(benchmark: str, key: str, found: Any, value: Any) -> str:
    if found is None:
        return f"{benchmark} was not selected; add it to benchmarks="
    if isinstance(found, dict) and "missing" in found:
        cure = f"; {found['cure']}" if found.get("cure") else ""
        return f"{benchmark}: {str(found['missing']).rstrip('.')}{cure}"
    if value is None:
        return f"{benchmark}: {key} is missing from results.json"
    return f"{benchmark}: {key} is {value!r}, which is not a finite number"
