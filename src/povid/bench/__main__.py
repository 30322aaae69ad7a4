"""``python -m povid.bench``: the cost of a training step, ours and others', on the same model and data."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from povid.bench import kernels, measure, whole
from povid.bench.arms import Arm, filled_cache, ours, plain, released_code
from povid.bench.pipeline import waiting
from povid.bench.subject import SHAPES, Shape, Step, adapt, build_model, build_processor, steps, twin
from povid.fault import Fault
from povid.files import write_json
from povid.machine import keep_freed_memory, versions
from povid.method.noise_dispreferred import most_likely
from povid.model.debug_llava import VOCABULARY
from povid.model.policy import Policy

SAME = {"float32": 1e-5, "bfloat16": 2e-2}  # relative difference of losses that summation order explains


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m povid.bench", description=__doc__)
    parser.add_argument(
        "--model",
        default="proportional",
        choices=list(SHAPES),
        help="proportional (for a CPU), llava_1_5_7b (for a GPU) or smallest",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights in the model's architecture; required for llava_1_5_7b, as a reminder that the "
        "times are meaningful and the losses are not",
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4, help="different batches, taken in turn")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (CPU)")
    parser.add_argument("--arms", default="", help="measure only the arms whose names contain this text, e.g. ours")
    parser.add_argument("--no-trl", action="store_true", help="skip TRL (which the optional extra `bench` installs)")
    parser.add_argument("--profile", action="store_true", help="also report where each arm's time goes")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="instead of timing arms: count the kernels that each launches in a step, and its waits for the device; "
        "without a GPU on a narrow model with the same layers, so that llava_1_5_7b takes no memory",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=790.0,
        help="dense rate of the device for utilisation; 790 was measured on an H100 in bf16",
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="*",
        default=[2, 0],
        help="numbers of loader processes for which to measure the wait for data (on a CPU)",
    )
    parser.add_argument("--photographs", type=int, default=60, help="number of photographs loaded for that")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="instead of timing arms: save the model as a checkpoint, train N steps of both stages from it by the "
        "ordinary path, stop, resume and caption a picture; minutes and memory of each (LLaVA-1.5-7B: 14 GB of disk)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where --steps keeps weights and run (default: outputs/bench/MODEL)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument(
        "overrides", nargs="*", help="with --steps: overrides of train.py, e.g. data=povid_17k data.root=DIR"
    )
    return parser.parse_args(arguments)


def build_arms(
    policy: Policy,
    made: list[Step],
    options: argparse.Namespace,
    shape: Shape,
    base: Any,
    processor: Any,
    folder: Path,
) -> list[tuple[Arm, list[torch.nn.Parameter]]]:
    """Every arm with the parameters that it trains."""
    stock = adapt(twin(base), processor, shape, fused=False)
    mine, others = ([p for group in each.trained_parameters() for p in group] for each in (policy, stock))
    cache = filled_cache(policy, made, folder)
    built = [
        (ours(policy, "stage 1"), mine),
        (ours(policy, "stage 1", cache), mine),
        (plain(stock, "stage 1"), others),
        (ours(policy, "released"), mine),
        (released_code(stock), others),
        (released_code(stock, checkpoint=True), others),
        (ours(policy, "eq5"), mine),
        (ours(policy, "eq5", cache), mine),
        (plain(stock, "eq5"), others),
        (plain(stock, "eq5", checkpoint=True), others),
    ]
    if not options.no_trl:
        from povid.bench.trl_arm import trl_dpo

        built[3:3] = [trl_dpo(policy, base, processor, checkpoint=checkpoint) for checkpoint in (False, True)]
    return [entry for entry in built if options.arms in entry[0].name]


def check_same(arms: list[Arm], policy: Policy, step: Step, tolerance: float) -> dict[str, float]:
    """The loss of each task, which every arm must give (with y_l^n pinned, since near ties could fall either way)."""
    with torch.no_grad():
        side = step.both.preferred.preferred
        logits_UV = policy.predict(step.both.preferred, policy.look(step.both.noised))
        pinned = most_likely(logits_UV)[side.position_N]
    losses: dict[str, float] = {}
    for arm in arms:
        loss = arm.run(step, None if arm.task == "stage 1" else pinned).item()
        expected = losses.setdefault(arm.task, loss)
        if abs(loss - expected) > tolerance * abs(expected):
            raise Fault(
                f"{arm.name} computes the loss {loss:.7f} in {arm.task} where {expected:.7f} was expected; the "
                "arms do not do the same work, so nothing is timed"
            )
    return losses


def run(options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[options.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _confirmed(options)
    if options.model == "llava_1_5_7b" and device == "cpu":
        raise Fault(
            "--model llava_1_5_7b needs a CUDA device with 40 GB, and none was found; use --model proportional, or "
            "--steps 1 for a whole run of it"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    processor = build_processor(shape)
    base = build_model(shape, device=device)
    made = steps(shape, processor, count=options.batches, batch_size=options.batch_size, device=device)
    policy = adapt(twin(base), processor, shape)
    with tempfile.TemporaryDirectory(prefix="povid-bench-") as folder:
        with _mixed(shape, device):
            built = build_arms(policy, made, options, shape, base, processor, Path(folder))
        result = measured(shape, policy, made, built, options, device)
    if device == "cpu":
        result["pipeline"] = [
            waiting(policy, processor, shape, workers=n, count=options.photographs) for n in options.workers
        ]
    return result


def run_kernels(options: argparse.Namespace) -> dict[str, Any]:
    _confirmed(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[options.model] if device == "cuda" else kernels.narrow(SHAPES[options.model])
    processor = build_processor(shape)
    base = build_model(shape, device=device)
    (step,) = steps(shape, processor, count=1, batch_size=options.batch_size, device=device)
    policy = adapt(twin(base), processor, shape)
    with tempfile.TemporaryDirectory(prefix="povid-bench-") as folder, _mixed(shape, device):
        arms = [arm for arm, _ in build_arms(policy, [step], options, shape, base, processor, Path(folder))]
        rows = kernels.count(arms, step, device=device)
    named = torch.cuda.get_device_name() if device == "cuda" else "no GPU, counted in operators"
    return {"model": shape.name, "device": named, "batch_size": options.batch_size, "rows": rows, **_circumstances()}


def run_whole(options: argparse.Namespace) -> dict[str, Any]:
    if options.steps < 1:
        raise Fault(f"--steps is {options.steps}; at least one step has to be trained")
    _confirmed(options)
    shape = SHAPES[options.model]
    if shape.vocabulary < VOCABULARY:
        raise Fault(f"--model {shape.name} has {shape.vocabulary} words, too few for --steps; use --model proportional")
    folder = options.folder or Path("outputs/bench") / options.model
    return {
        "model": options.model,
        **whole.measure(shape, options.steps, folder, options.overrides),
        **_circumstances(),
    }


def _confirmed(options: argparse.Namespace) -> None:
    if options.model == "llava_1_5_7b" and not options.random_weights:
        raise Fault("--model llava_1_5_7b: the benchmark uses random weights; add --random-weights to confirm")


def _circumstances() -> dict[str, Any]:
    return {
        "versions": versions() | {"trl": _version("trl")},
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m povid.bench " + " ".join(sys.argv[1:]),
    }


def measured(
    shape: Shape, policy: Policy, made: list[Step], built, options: argparse.Namespace, device: str
) -> dict[str, Any]:
    arms = [arm for arm, _ in built]
    with _mixed(shape, device):
        losses = check_same(arms, policy, made[0], SAME[shape.dtype])
    optimizers = {id(parameters): torch.optim.AdamW(parameters, lr=0.0, foreach=True) for _, parameters in built}

    def one(arm: Arm, parameters: list, number: int) -> None:
        with _mixed(shape, device):
            arm.run(made[number % len(made)], None)
        optimizers[id(parameters)].step()
        optimizers[id(parameters)].zero_grad()

    calls = [partial(one, arm, parameters) for arm, parameters in built]
    load_before = os.getloadavg()[0]
    seconds = measure.interleaved(calls, warmups=options.warmups, repetitions=options.repetitions, device=device)
    load_after = os.getloadavg()[0]
    rows = []
    for arm, call, times in zip(arms, calls, seconds):
        middle, low, high = measure.spread([wall for wall, _ in times])
        worked = measure.spread([processor for _, processor in times])[0]
        cached = arm.name == "ours, reference cached"
        floor = options.batch_size * measure.floor_flops(shape, arm.task, cached=cached)
        least = options.batch_size * measure.floor_flops(shape, arm.task)
        row = {
            "arm": arm.name,
            "task": arm.task,
            "ms": 1e3 * middle,
            "processor_ms": 1e3 * worked,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ms_per_example": 1e3 * middle / options.batch_size,
            "peak_mb": measure.peak_bytes(partial(call, 0), device=device) / 2**20,
            "gflop": measure.flops(partial(call, 0)) / 1e9,
            "floor_gflop": floor / 1e9,
            "uncached_floor_gflop": least / 1e9,
        }
        if options.profile:
            row["shares"] = measure.shares(partial(call, 0), device=device, repetitions=min(options.repetitions, 10))
        if device == "cuda":
            row["utilisation"] = floor / middle / (options.peak_tflops * 1e12)
        rows.append(row)
    return {
        "model": options.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "tokens": {"image": shape.image_tokens, "prompt": shape.prompt, "response": shape.response},
        "losses": losses,
        "rows": rows,
        "ratios": ratios(rows),
        "load_average": [round(load_before, 2), round(load_after, 2)],
        **_circumstances(),
    }


def _mixed(shape: Shape, device: str) -> torch.autocast:
    """Lightning's bf16-mixed if the weights are in bf16."""
    return torch.autocast(device, torch.bfloat16, enabled=shape.dtype == "bfloat16")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Other arms against ours: ratios of median times and of peak memory."""
    at = {(row["task"], row["arm"]): row for row in rows}

    def ratio(what: str, other: tuple[str, str], mine: list[tuple[str, str]]) -> dict[str, Any] | None:
        if other not in at or any(key not in at for key in mine):
            return None
        mean = sum(at[key]["ms"] for key in mine) / len(mine)
        peak = max(at[key]["peak_mb"] for key in mine)
        worked = sum(at[key]["processor_ms"] for key in mine) / len(mine)
        return {
            "what": what,
            "speed": at[other]["ms"] / mean,
            "processor": at[other]["processor_ms"] / worked,
            "memory": peak / at[other]["peak_mb"],
        }

    one, cached = ("stage 1", "ours"), ("stage 1", "ours, reference cached")
    found = [
        ratio("stage 1, no cache: TRL", ("stage 1", "TRL DPOTrainer"), [one]),
        ratio(
            "stage 1, three epochs, the cache's cost included: TRL",
            ("stage 1", "TRL DPOTrainer"),
            [one, cached, cached],
        ),
        ratio("stage 1, no cache: TRL as it comes", ("stage 1", "TRL DPOTrainer, as it comes"), [one]),
        ratio(
            "stage 1, three epochs: TRL as it comes", ("stage 1", "TRL DPOTrainer, as it comes"), [one, cached, cached]
        ),
        ratio("stage 1, no cache: plain", ("stage 1", "plain"), [one]),
        ratio("stage 2, released objective: released code", ("released", "released code"), [("released", "ours")]),
        ratio(
            "stage 2, released objective: released code, checkpointing",
            ("released", "released code, checkpointing"),
            [("released", "ours")],
        ),
        ratio("stage 2, Eq. 5: plain", ("eq5", "plain"), [("eq5", "ours")]),
        ratio("stage 2, Eq. 5: plain, checkpointing", ("eq5", "plain, checkpointing"), [("eq5", "ours")]),
        ratio("stage 2, Eq. 5, reference cached: plain", ("eq5", "plain"), [("eq5", "ours, reference cached")]),
    ]
    return [entry for entry in found if entry is not None]


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['device']} ({result['threads']} threads), batches of "
        f"{result['batch_size']}, median of {result['repetitions']}; image, prompt and response tokens: "
        f"{', '.join(map(str, result['tokens'].values()))}; load average {result['load_average'][0]} before and "
        f"{result['load_average'][1]} after",
        "",
    ]
    used = "  of peak" if "utilisation" in result["rows"][0] else ""
    lines.append(
        f"{'task':9} {'arm':30} {'ms':>8} {'quartiles':>17} {'cpu ms':>8} {'peak MiB':>9} {'GFLOP':>9} "
        f"{'of floor':>8}{used}"
    )
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        share = f"  {row['utilisation']:7.1%}" if used else ""
        lines.append(
            f"{row['task']:9} {row['arm']:30} {row['ms']:8.1f} {low:8.1f} {high:8.1f} "
            f"{row['processor_ms']:8.1f} {row['peak_mb']:9.1f} {row['gflop']:9.2f} "
            f"{row['gflop'] / row['uncached_floor_gflop']:8.2f}{share}"
        )
    lines += ["", f"{'others against ours':59} {'times as long':>13} {'cpu time':>8} {'our peak memory':>16}"]
    lines += [
        f"{entry['what']:59} {entry['speed']:13.2f} {entry['processor']:8.2f} {entry['memory']:16.0%}"
        for entry in result["ratios"]
    ]
    if "shares" in result["rows"][0]:
        lines += ["", f"{'where the time goes':40} " + " ".join(f"{kind:>26}" for kind in measure.KINDS)]
        for row in result["rows"]:
            spent = " ".join(f"{row['shares'][kind]:26.1%}" for kind in measure.KINDS)
            lines.append(f"{row['task']:9} {row['arm']:30} {spent}")
    lines += [
        f"\n{entry['workers']} loader processes, 336-pixel photographs: a step of {entry['works_ms']:.1f} ms "
        f"waits {entry['waits_ms']:.2f} ms for its data ({entry['share']:.1%})"
        for entry in result.get("pipeline", ())
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for name in ("transformers", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if options.steps is None and options.overrides:
            raise Fault(f"{options.overrides[0]!r} is an override of train.py, which only --steps takes")
        if options.steps is not None and options.kernels:
            raise Fault("--kernels and --steps are two measurements; choose one")
        made, shown = (run_whole, whole.table) if options.steps is not None else (run, table)
        result = (run_kernels if options.kernels else made)(options)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print((kernels.table if options.kernels else shown)(result))
    write_json(options.out, result)
    print(f"\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
