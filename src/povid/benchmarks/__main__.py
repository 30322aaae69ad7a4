"""Score an answer file made by any model, download the official files of benchmarks, or compare judges."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import povid.benchmarks
from povid.benchmarks.benchmark import Benchmark
from povid.fault import Fault, did_you_mean, validated
from povid.files import write_text
from povid.machine import conf_folder, environment


def find(name: str) -> type[Benchmark]:
    """A benchmark's class: ours by the name of its file, anybody's by its dotted path.

    Raises:
        Fault: there is no such benchmark, or the path does not lead to a subclass of Benchmark.
    """
    if "." in name:
        try:
            found = pkgutil.resolve_name(name)
        except Exception as error:  # whatever importing somebody's module raises
            raise Fault(f"{name} cannot be imported ({error}); give the dotted path of a benchmark's class") from None
        if not (isinstance(found, type) and issubclass(found, Benchmark)):
            raise Fault(f"{name} is not a subclass of povid.benchmarks.benchmark.Benchmark; give the path of one")
        return found
    ours = {module.name for module in pkgutil.iter_modules(povid.benchmarks.__path__)} - {"__main__"}
    if name in ours and (found := _defined(importlib.import_module(f"{povid.benchmarks.__name__}.{name}"))):
        return found
    known = names()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}, or a class by its dotted path"
    raise Fault(f"there is no benchmark {name!r}; {hint}")


def names() -> list[str]:
    """The names of our benchmarks, those of their files."""
    modules = [module.name for module in pkgutil.iter_modules(povid.benchmarks.__path__) if module.name != "__main__"]
    return [name for name in modules if _defined(importlib.import_module(f"{povid.benchmarks.__name__}.{name}"))]


def _defined(module: ModuleType) -> type[Benchmark] | None:
    """The benchmark that a module defines, if any."""
    kinds = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    return next((kind for kind in kinds if issubclass(kind, Benchmark) and kind is not Benchmark), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after one sentence about what the user can fix, or 130 when it is interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = {"fetch": _fetch, "calibrate": _calibrate}.get(arguments[0] if arguments else "")
        return command(arguments[1:]) if command else _score(arguments)
    except KeyboardInterrupt:
        print("stopped; started again, a download goes on where it was", file=sys.stderr)
        return 130
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or 'a file'}: {error.strerror or error}; fix that and run again", file=sys.stderr
        )
        return 2


class _Help(argparse.ArgumentParser):
    """Lists the benchmarks below the help; only then, for that imports them all."""

    def format_help(self) -> str:
        return f"{super().format_help()}\nBenchmarks: {', '.join(names())}, or a class by its dotted path.\n"


def _fetch(arguments: Sequence[str]) -> int:
    parser = _Help(
        prog="python -m povid.benchmarks fetch",
        description="Download the official files of a benchmark or of a selection such as table3, and say what to do "
        "by hand. Started again, a download goes on where it was.",
    )
    parser.add_argument("name", metavar="NAME", help="the benchmark, or a selection of conf/benchmarks")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder of the benchmark's files; of a selection, the folder with one for each (default: $POVID_DATA, or "
        "data, and for a single benchmark its folder below)",
    )
    parser.add_argument(
        "--pictures",
        choices=("named", "all", "none"),
        default="named",
        help="of COCO: those that the questions name (default), the whole archive of 6.6 GB, or none",
    )
    given = parser.parse_args(arguments)
    selection = _selection(given.name, given.data)
    from povid.benchmarks import fetch  # only here: scoring needs no network code

    return 0 if fetch.main(selection, pictures=given.pictures) else 2


def _selection(name: str, data: Path | None) -> dict[str, Benchmark]:
    """A benchmark, or those of a file of conf/benchmarks, with the folders that ``data`` means (see ``_fetch``)."""
    root = Path(os.environ.get("POVID_DATA") or "data")
    if not (conf_folder() / "benchmarks" / f"{name}.yaml").is_file():
        benchmark = find(name)
        return {benchmark.name: validated(benchmark, {"data": data or root / benchmark.name}, name)}
    from hydra import compose, initialize_config_dir  # only here: scoring needs no configuration
    from omegaconf import OmegaConf

    single = name in names()
    place = str(root if single or data is None else data)
    with environment("POVID_DATA", place), initialize_config_dir(str(conf_folder()), version_base="1.3"):
        nodes: Any = OmegaConf.to_container(compose(overrides=[f"+benchmarks=[{name}]"]).benchmarks, resolve=True)
    found = {}
    for key, node in nodes.items():
        settings = {k: v for k, v in node.items() if k != "_target_"} | ({"data": data} if single and data else {})
        found[key] = validated(find(node["_target_"]), settings, f"benchmarks.{key}")
    return found


def _score(arguments: Sequence[str]) -> int:
    parser = _Help(
        prog="python -m povid.benchmarks",
        description="Score an answer file, without a model, as the official script of the benchmark scores it.",
        epilog="To download official files: python -m povid.benchmarks fetch NAME --data DIR\n"
        "To compare a judge with the official one: python -m povid.benchmarks calibrate NAME --data DIR --judge open",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="the benchmark, or: fetch, calibrate")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        type=Path,
        required=True,
        help="answers in any official layout; for pope also a folder with one file per split",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the official files")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the images, where scoring needs them")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=int,
        help="score only the answers about the first N pictures (MME: of each subtask; MMBench: the first N questions)",
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write scores and the decision about each answer here")
    _judge_arguments(parser, "judge (mmhal, mm_vet, llava_bench; mmbench where rules do not decide)")
    given = parser.parse_args(arguments)

    kind = find(given.name)
    if not given.answers.exists():
        raise Fault(f"{given.answers}: no such file; give the answers to be scored")
    if not given.data.exists():
        raise Fault(
            f"{given.data} does not exist; give the folder of the official files, or run "
            f"`python -m povid.benchmarks fetch {given.name} --data {given.data}`"
        )
    if kind.judged == "always" and not (given.judge_model or given.judge):
        raise Fault(
            f"{given.name} is scored by a judge; name its model with --judge-model, or a file of settings with --judge"
        )
    settings = {"data": given.data, "images": given.images, "limit": given.limit}
    benchmark = validated(kind, settings, given.name).for_answers(given.answers)
    questions, limited = benchmark.loaded(), benchmark.limited
    judging = _judge(given) if (given.judge_model or given.judge) and kind.judged != "never" else None
    score = benchmark.score_file(given.answers, questions, judging)
    scores = score.scores | ({"limit": limited} if limited else {})
    if given.json:
        write_text(given.json, json.dumps({"scores": scores, "records": score.records}, indent=1))
    asked = f"{len(questions)} questions" + (f" of {limited['of']}, as --limit {given.limit} says" if limited else "")
    print(f"{given.name}: {given.answers}, {asked} (scored as {benchmark.official})")
    if judging:
        words = judging.words(benchmark)
        prompt = "the official prompt" if words.name == "official" else f"the prompt in our own wording ({words.name})"
        print(f"judge: {judging.model_for(benchmark)}, {prompt}")
    print(table(score.scores, decimals=benchmark.decimals))
    for line in benchmark.notes(score):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _judge_arguments(parser: argparse.ArgumentParser, title: str) -> None:
    judge = parser.add_argument_group(title)
    judge.add_argument(
        "--judge",
        metavar="NAME",
        help="settings of conf/judge/NAME.yaml, such as openai or open; the options below take precedence",
    )
    judge.add_argument("--judge-model", metavar="MODEL", help="the judging model; 'official' for the official one")
    judge.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server; by default OPENAI_BASE_URL")
    judge.add_argument(
        "--judge-revision", metavar="COMMIT", help="of the open weights that the server was started with"
    )
    judge.add_argument(
        "--judge-wording",
        choices=["official", "own"],
        help="the prompt's wording; by default the official one where it was fetched",
    )
    judge.add_argument(
        "--judge-key-env",
        metavar="NAME",
        help="environment variable that holds the key (default: OPENAI_API_KEY)",
    )
    judge.add_argument(
        "--judge-cache",
        metavar="FILE",
        type=Path,
        help="every reply is kept here, nothing is asked twice (default: outputs/judge_replies.jsonl)",
    )
    judge.add_argument("--judge-token-budget", metavar="N", type=int, help="stop before more tokens would be used")
    judge.add_argument(
        "--judge-ask-again",
        action="store_true",
        default=None,
        help="ask once more for replies on disk that could not be read, after a server has been mended",
    )


def _judge(given: argparse.Namespace) -> Any:
    from povid.benchmarks.judge import Judge  # only here: most benchmarks need no judge

    settings = {"cache": Path("outputs/judge_replies.jsonl")} | (_judge_file(given.judge) if given.judge else {})
    options = {
        "cache": given.judge_cache,
        "model": given.judge_model,
        "revision": given.judge_revision,
        "wording": given.judge_wording,
        "base_url": given.judge_url,
        "api_key_env": given.judge_key_env,
        "token_budget": given.judge_token_budget,
        "ask_again": given.judge_ask_again,
    }
    if given.judge_model and "revision" in settings:
        del settings["revision"]  # it is that of another model
    settings |= {key: value for key, value in options.items() if value is not None}
    if given.judge_model == "official":
        settings["model"] = None
    return validated(Judge, settings, "judge")


def _judge_file(name: str) -> dict[str, Any]:
    """The settings of conf/judge/NAME.yaml. Raises Fault if there is no such judge."""
    from omegaconf import OmegaConf  # only here: most benchmarks need no judge

    known = {file.stem: file for file in sorted((conf_folder() / "judge").glob("*.yaml")) if file.stem != "none"}
    if name not in known:
        raise Fault(f"there is no judge {name!r}{did_you_mean(name, list(known), 'judges')}")
    node = OmegaConf.merge({"outputs": "outputs"}, {"judge": OmegaConf.load(known[name])})
    settings: Any = OmegaConf.to_container(node.judge, resolve=True)
    return {key: value for key, value in settings.items() if key != "_target_"}


def _calibrate(arguments: Sequence[str]) -> int:
    parser = _Help(
        prog="python -m povid.benchmarks calibrate",
        description="Compare a judge with the official one, on answers whose official grades are published: mm_vet and "
        "llava_bench.",
    )
    parser.add_argument("name", metavar="NAME", help="the benchmark")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder that `fetch` filled")
    parser.add_argument("--limit", metavar="N", type=int, help="only the questions about the first N pictures")
    parser.add_argument(
        "--resamples", metavar="N", type=int, default=2000, help="of the bootstrap (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the figures and every answer's grades here")
    _judge_arguments(parser, "judge")
    given = parser.parse_args(arguments)
    from povid.benchmarks import calibrate

    kind = find(given.name)
    if not (given.judge_model or given.judge):
        raise Fault("which judge? Name a file of settings with --judge, or a model with --judge-model")
    if given.resamples < 100:
        raise Fault(f"--resamples is {given.resamples}; an interval needs at least 100")
    benchmark = validated(kind, {"data": given.data, "limit": given.limit}, given.name)
    found = calibrate.calibrate(benchmark, _judge(given), given.resamples)
    if given.json:
        write_text(given.json, json.dumps(found, indent=1))
    print(calibrate.text(found, table))
    return 0


def table(scores: Mapping[str, Any], *, decimals: int = 1, indent: str = "") -> str:
    """Lines "name  value"; groups indented under their name, and groups of the same figures as rows of one grid."""
    single = {key: value for key, value in scores.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in scores.items() if isinstance(value, Mapping)}
    flat = {
        key: list(group)
        for key, group in groups.items()
        if len(group) > 1 and not any(isinstance(value, Mapping) for value in group.values())
    }
    alike = [key for key in flat if list(flat.values()).count(flat[key]) > 1 and flat[key] == next(iter(flat.values()))]
    width = max((len(key) for key in [*single, *alike]), default=0)
    lines = [f"{indent}{key:<{width}}  {_shown(value, decimals):>9}" for key, value in single.items()]
    if alike:
        columns = list(groups[alike[0]])
        lines.append(f"{indent}{'':<{width}}" + "".join(f"  {column:>9}" for column in columns))
        lines += [
            f"{indent}{key:<{width}}"
            + "".join(f"  {_shown(value, decimals):>{max(9, len(column))}}" for column, value in groups[key].items())
            for key in alike
        ]
    for key in [key for key in groups if key not in alike]:
        lines += [f"{indent}{key}:", table(groups[key], decimals=decimals, indent=indent + "  ")]
    return "\n".join(lines)


def _shown(value: Any, decimals: int) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
