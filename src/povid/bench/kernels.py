"""How many kernels a step launches, and how often the host waits for the device.

On CUDA the profiler counts both, on the model itself. Without a GPU the count is of operators below autograd that
compute something, each of which a GPU runs as one kernel or more. Their number depends on the layers, the kind of model
and the precision, but on no width, so that a narrow model with the same layers and tokens is counted. The optimizer is
left out; it is the same for every arm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from povid.bench.arms import Arm
from povid.bench.measure import LAYOUT, quiet
from povid.bench.subject import Shape, Step

READS = {"_local_scalar_dense", "nonzero"}  # a result that the host waits for, as it does where a mask is an index
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


def narrow(shape: Shape) -> Shape:
    """The shape with its layers and tokens, and widths that cost nothing."""
    return replace(shape, width=32, heads=2, inner=48, vision_width=16, vision_heads=2, lora=2, vocabulary=128)


class Launches(TorchDispatchMode):
    """Counts kernels by operator, and waits, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        by_mask = name in BY_INDEX and any(each is not None and each.dtype == torch.bool for each in args[1])
        self.waits += name in READS or by_mask
        views = any(entry.alias_info is not None and not entry.alias_info.is_write for entry in func._schema.arguments)
        free = views or name in LAYOUT - {"_to_copy"} or name.startswith(("new_empty", "_local_scalar", "sym_", "is_"))
        if space == "aten" and not free:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def launches(step: Callable[[], object], *, device: str) -> tuple[int, int, dict[str, int]]:
    """(kernels, waits, kernels by name) of a step."""
    if device == "cuda":
        return _on_cuda(step)
    with Launches() as seen:
        step()
    return seen.kernels.total(), seen.waits, dict(seen.kernels.most_common())


def _on_cuda(step: Callable[[], object]) -> tuple[int, int, dict[str, int]]:
    from torch.profiler import ProfilerActivity, profile

    step()  # chooses algorithms
    torch.cuda.synchronize()
    with quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        step()
        torch.cuda.synchronize()
    counted: Counter[str] = Counter()
    waits = -1  # the last line above
    for event in watched.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counted[event.key] += event.count
        waits += event.count * (event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    return counted.total(), waits, dict(counted.most_common())


def count(arms: list[Arm], step: Step, *, device: str) -> list[dict[str, Any]]:
    """A row for each arm."""
    rows = []
    for arm in arms:
        kernels, waits, names = launches(lambda: arm.run(step, None), device=device)  # noqa: B023
        rows.append({"task": arm.task, "arm": arm.name, "kernels": kernels, "waits": waits, "by_name": names})
    return rows


def table(result: dict[str, Any]) -> str:
    """Kernels and waits of every arm, and kernels against ours without a cache."""
    ours = {row["task"]: row["kernels"] for row in result["rows"] if row["arm"] == "ours"}
    lines = [f"{result['model']} on {result['device']}, batches of {result['batch_size']}, forward and backward", ""]
    lines.append(f"{'task':9} {'arm':30} {'kernels':>8} {'of ours':>8} {'waits':>6}")
    for row in result["rows"]:
        ratio = f"{row['kernels'] / ours[row['task']]:8.2f}" if row["task"] in ours else " " * 8
        lines.append(f"{row['task']:9} {row['arm']:30} {row['kernels']:8,} {ratio} {row['waits']:6}")
    return "\n".join(lines)
