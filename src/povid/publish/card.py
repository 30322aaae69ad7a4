"""The model card of a run: Markdown below a YAML head, made from its results.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from povid.fault import Fault
from povid.model.adapters import VLLM_RANKS
from povid.report.render import markdown_row
from povid.report.runs import Run
from povid.report.tables import row_of

TEMPLATE = Path(__file__).parent / "card.md"
PAPER = "2402.11411"
TASK = "image-text-to-text"
# Settings of the model that decide what it sees and computes, in the order of the card.
MODEL = ("style", "system", "pad_square", "max_length", "dtype", "quantize", "merge", "train_projector")
STAGE = ("epochs", "lr", "projector_lr", "accumulate", "max_steps", "warmup_ratio", "weight_decay", "max_grad_norm")
VERSIONS = ("povid", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Base:
    """The base model as others know it: its ``name`` on the hub and ``commit``, or the folder inside povid."""

    name: str | None
    commit: str | None = None
    package: str | None = None


@dataclass(frozen=True)
class License:
    """A license as model cards name it; ``name`` and ``link`` belong to the id ``other``."""

    id: str
    name: str | None = None
    link: str | None = None


def license_of(base: Base, wanted: str | None = None) -> License:
    """The license of a base model: the ``wanted`` one, that of povid for its own model, or what its card says.

    Raises:
        Fault: its card cannot be read or names no license.
    """
    if wanted:
        return License(wanted)
    if base.package:
        return License(metadata("povid")["License-Expression"].lower())
    cure = f"name it with --license, as the page of {base.name} on the hub states it"
    try:
        data = ModelCard.load(base.name, ignore_metadata_errors=True).data
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith("httpx"):
            raise
        raise Fault(
            f"the license of {base.name} could not be read ({type(error).__name__}); go online, or {cure}"
        ) from None
    if not isinstance(data.license, str):
        raise Fault(f"the model card of {base.name} names no license; {cure}")
    return License(data.license, data.license_name, data.license_link)


def card(
    run: Run, base: Base, license: License, *, repo: str, adapter: Mapping[str, Any] | None, dtype: str | None
) -> str:
    """The text of README.md.

    Args:
        repo: what the model is called: OWNER/NAME.
        adapter: the settings of the published adapter; None for a merged checkpoint in ``dtype``.
    """
    results, parts = run.results, run.results["identity"]["parts"]
    scores = row_of(run)
    rank = None if adapter is None else adapter["r"]
    data = ModelCardData(
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        base_model=base.name,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=TASK,
        tags=[
            "povid",
            "preference-tuning",
            "hallucination",
            f"arxiv:{PAPER}",
            *(["embedded-world"] if run.painted else []),
        ],
        model_name=repo.rpartition("/")[2],
        eval_results=[_score(run, column, cell) for column, cell in scores] or None,
    )
    made = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        repo=repo,
        base=base,
        license=license,
        results=results,
        painted=run.painted,
        limits=run.limits,
        partial=_partial(run),
        scores=markdown_row(scores) if scores else "",
        unscored=sorted(name for name, found in run.benchmarks.items() if "missing" in found),
        model={key: parts[f"model.{key}"] for key in MODEL if parts.get(f"model.{key}") not in (None, "", False)},
        stages=results["stages"],
        terms={number: ", ".join(stage.get("terms", ())) for number, stage in results["stages"].items()},
        settings=_settings(results, parts),
        versions=", ".join(f"{name} {results['versions'][name]}" for name in VERSIONS if name in results["versions"]),
        identity=results["identity"]["digest"],
        adapter=adapter,
        rank=rank,
        vllm_rank=next((allowed for allowed in VLLM_RANKS if rank is not None and allowed >= rank), None),
        dtype=dtype,
        paper=PAPER,
        code=_code,
    )
    return f"{str(made).strip()}\n"


def _score(run: Run, column: Any, cell: Any) -> EvalResult:
    name = column.key.partition(".")[0]
    where = [*(["embedded world"] if run.painted else []), *([run.limit] if run.limit else [])]
    return EvalResult(
        task_type=TASK,
        dataset_type=name,
        dataset_name=f"{name} ({', '.join(where)})" if where else name,
        metric_type=column.key.partition(".")[2],
        metric_name=column.heading,
        metric_value=round(cell.summary.mean, column.decimals),
    )


def _partial(run: Run) -> str:
    """A sentence if the run did not train all stages of its ablation by itself."""
    if "stage" in run.settings:
        return f"Only stage {run.settings['stage']} of `ablation={run.results['ablation']}` was trained."
    if "stage 1" in run.settings:
        return "Stage 1 was trained by another run; its adapter is part of this model."
    return ""


def _settings(results: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
    """What the stages were trained with, as overrides of the command line."""
    found = {f"model.lora.{key}": parts.get(f"model.lora.{key}") for key in ("r", "alpha", "dropout")}
    for number in results["stages"]:
        prefix = f"stages.{number}"
        found |= {key: value for key, value in parts.items() if key.startswith(f"objective.{number}.")}
        found |= {f"{prefix}.{key}": parts.get(f"{prefix}.{key}") for key in STAGE}
    found |= {key: value for key, value in parts.items() if key.startswith("noise.")}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in found.items() if value is not None]


def _code(value: Any) -> str:
    """A value as a code span, which no Markdown inside it can end."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"
