"""Scores an answer file made by anybody's model, or fetches a benchmark's official files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from povid.benchmarks import suite
from povid.benchmarks.answer_file import write_text
from povid.fault import Fault
from povid.model.question import Question


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one sentence about what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _fetch(arguments[1:]) if arguments[:1] == ["fetch"] else _score(arguments)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; mend that, run again.", file=sys.stderr)
        return 2


def _fetch(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m povid.benchmarks fetch",
        description="Download a benchmark's official files, or say what to do by hand.",
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(suite.BENCHMARKS))
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder that receives the files")
    given = parser.parse_args(arguments)
    suite.check_name(given.name)
    from povid.benchmarks import fetch  # only here: scoring needs no network code

    return fetch.main(given.name, given.data) or 0


def _score(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m povid.benchmarks",
        description="Score an answer file, without a model, as the official script of the benchmark scores it.",
        epilog="Benchmarks: " + ", ".join(suite.BENCHMARKS) + ". To download official files: "
        "python -m povid.benchmarks fetch NAME --data DIR",
    )
    parser.add_argument("name", metavar="NAME", help="the benchmark, or: fetch")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        type=Path,
        required=True,
        help="answers in any official layout; for pope also a folder with one file per split",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the official files")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the pictures, where scoring needs them")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write scores and the decision about each answer here")
    judge = parser.add_argument_group("judge (mmhal, mm_vet, llava_bench; mmbench where rules do not decide)")
    judge.add_argument("--judge-model", metavar="MODEL", help="the judging model; 'official' for the official one")
    judge.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server; by default OPENAI_BASE_URL")
    judge.add_argument(
        "--judge-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable that holds the key (default: %(default)s)",
    )
    judge.add_argument(
        "--judge-cache",
        metavar="FILE",
        type=Path,
        default=Path("outputs/judge_replies.jsonl"),
        help="every reply is kept here, nothing is asked twice (default: %(default)s)",
    )
    judge.add_argument("--judge-token-budget", metavar="N", type=int, help="stop before more tokens would be used")
    given = parser.parse_args(arguments)

    module = suite.module_of(given.name)
    if not given.answers.exists():
        raise Fault(f"{given.answers}: no such file; give the answers to be scored.")
    if not given.data.is_dir():
        raise Fault(
            f"{given.data} is no folder; give the folder of the official files, or run "
            f"`python -m povid.benchmarks fetch {given.name} --data {given.data}`."
        )
    if suite.judged(module) and not given.judge_model:
        raise Fault(f"{given.name} is scored by a judge; name its model with --judge-model.")
    questions = _questions(given.name, module, given)
    answers = module.read_answers(given.answers, questions)
    score = suite.scored(module, questions, answers, _judge(given) if given.judge_model else None)
    if given.json:
        write_text(given.json, json.dumps({"scores": score.scores, "records": score.records}, indent=1))
    print(f"{given.name}: {len(answers)} answers of {given.answers} (scored as {module.OFFICIAL})")
    print(table(score.scores, decimals=2 if given.name == "mmhal" else 1))
    for line in _notes(given.name, score.scores, score.records):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _questions(name: str, module: ModuleType, given: argparse.Namespace) -> list[Question]:
    """The questions that the answers belong to: CHAIR's images and POPE's splits are the answer file's."""
    if name == "chair":
        return module.load(given.data, given.images, only=[image for _, image, _ in module.captions(given.answers)])
    if name == "pope":
        return module.load(given.data, given.images, splits=module.answered_splits(given.answers, given.data))
    return module.load(given.data, given.images)


def _judge(given: argparse.Namespace) -> Any:
    from povid.benchmarks.judge import Judge  # only here: most benchmarks need no judge

    model = None if given.judge_model == "official" else given.judge_model
    return Judge(
        given.judge_cache,
        model=model,
        base_url=given.judge_url,
        api_key_env=given.judge_key_env,
        token_budget=given.judge_token_budget,
    )


def _notes(name: str, scores: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader of a CHAIR score must know about captions that are not in it."""
    if name != "chair":
        return
    empty = [record["image_id"] for record in records if not record["counted"]]
    if empty:
        yield (
            f"{len(empty)} empty captions left out, as the official to_chair.py does; the first is of image "
            f"{empty[0]!r}."
        )
    if scores.get("without_caption"):
        yield f"{scores['without_caption']} images of objects.json have no caption and are not in the score."


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
