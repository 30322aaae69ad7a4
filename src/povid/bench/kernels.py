"""How many kernels a step launches, and how often the host waits for the device.

On CUDA the profiler counts both. Without a GPU the true model runs on torch's fake tensors, which have shapes and no
numbers: what is counted is every operator below autograd that computes something, each of which a GPU runs as one kernel
or more. The optimizer is left out; it is the same for every arm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from povid.bench.arms import Arm
from povid.bench.measure import LAYOUT, quiet
from povid.bench.subject import Step
from povid.method.objectives import Terms
from povid.training.datamodule import PreferenceBatch

READS = {"_local_scalar_dense", "nonzero"}  # a result that the host waits for, as it does where a mask is an index
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Launches(TorchDispatchMode):
    """Counts kernels by operator while it is active.

    Fake tensors have no numbers: one that the host asks for is 1, and a mask that it indexes with is true everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        by_mask = name in BY_INDEX and any(each is not None and each.dtype == torch.bool for each in args[1])
        self.waits += name in READS or by_mask
        views = any(entry.alias_info is not None and not entry.alias_info.is_write for entry in func._schema.arguments)
        if space == "aten" and not (views or name in LAYOUT or name.startswith(("new_empty", "sym_", "is_same"))):
            self.kernels[name] += 1
        if name == "_local_scalar_dense":
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if name == "nonzero":
            return torch.stack(_everywhere(args[0]), -1)
        if by_mask:
            places = [
                place
                for each in args[1]
                for place in (_everywhere(each) if each is not None and each.dtype == torch.bool else [each])
            ]
            args = (args[0], places, *args[2:])
        return func(*args, **(kwargs or {}))


def _everywhere(mask: Tensor) -> list[Tensor]:
    """The index, one tensor for each dimension, of a mask that is true everywhere."""
    return [mask.new_empty(mask.numel(), dtype=torch.long) for _ in mask.shape]


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
    waits = -1  # the last line of the step above
    for event in watched.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counted[event.key] += event.count
        waits += event.count * (event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    return counted.total(), waits, dict(counted.most_common())


class KnownReference:
    """Stands for a filled cache of reference log-probabilities where there are no numbers."""

    def find(self, batch: PreferenceBatch) -> Terms:
        return Terms(*torch.empty(2, batch.pairs.examples))


def count(arms: list[Arm], step: Step, *, device: str) -> list[dict[str, Any]]:
    """A row for each arm. The tokens of y_l^n are given, since without numbers none can be chosen."""
    rows = []
    for arm in arms:
        response = sum(sum(example.preferred.response) for example in step.examples)
        pinned = None if arm.task == "stage 1" else torch.zeros(response, dtype=torch.long, device=device)
        kernels, waits, names = launches(lambda: arm.run(step, pinned), device=device)  # noqa: B023
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
