"""Time, memory and operations of arms, and the minimum of operations that the mathematics requires."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from povid.bench.subject import Shape


def interleaved(
    arms: Sequence[Callable[[int], object]], *, warmups: int, repetitions: int, device: str
) -> list[list[tuple[float, float]]]:
    """(seconds, seconds of processor time) of every repetition of every arm.

    The arms take turns, each round starting with another one, so that a slow minute of the machine affects all of them.
    An arm is called with the number of the repetition.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in arms]
    for repetition in range(-warmups, repetitions):
        for place in range(len(arms)):
            arm = (place + repetition) % len(arms)
            _wait(device)
            start, worked = time.perf_counter(), time.process_time()
            arms[arm](repetition % max(repetitions, 1))
            _wait(device)
            if repetition >= 0:
                seconds[arm].append((time.perf_counter() - start, time.process_time() - worked))
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return middle, low, high


def peak_bytes(step: Callable[[], object], *, device: str) -> int:
    """Peak bytes of a step, beyond what was allocated before it (weights, adapter, optimiser).

    On a CPU the profiler records every allocation; on CUDA the allocator counts them.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    step()  # allocates what later steps reuse
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """Silence stderr, to which the profiler's library writes each time it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


KINDS = ("matrix products", "attention", "optimizer", "element by element", "Python, autograd, dispatch")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution")
LAYOUT = {  # operators that only change how memory is read, or allocate it
    "view",
    "t",
    "transpose",
    "as_strided",
    "expand",
    "slice",
    "select",
    "permute",
    "unsqueeze",
    "squeeze",
    "reshape",
    "detach",
    "alias",
    "empty",
    "empty_like",
    "empty_strided",
    "narrow",
    "split",
    "unbind",
    "_unsafe_view",
    "to",
    "_to_copy",
    "result_type",
    "view_as",
    "expand_as",
    "contiguous",
    "flatten",
    "resize_",
    "set_",
    "item",
    "is_nonzero",
}


def kind_of(operator: str) -> str:
    """The kind (of KINDS) of a profiler event, from its name on a CPU (``aten::mm``) or its kernel's name on CUDA."""
    name = operator.removeprefix("aten::").lower()
    if "attention" in name or "fmha" in name or "flash" in name:
        return "attention"
    if "adam" in name or "optimizer" in name:
        return "optimizer"
    if name in _PRODUCTS or any(word in name for word in ("convolution", "gemm", "nvjet", "cutlass", "xmma", "cudnn")):
        return "matrix products"
    on_device = not operator.startswith("aten::") and ("kernel" in name or "memcpy" in name or "memset" in name)
    if on_device or (operator.startswith("aten::") and name not in LAYOUT):
        return "element by element"
    return "Python, autograd, dispatch"


def shares(step: Callable[[], object], *, device: str, repetitions: int = 10) -> dict[str, float]:
    """Share of a step's time in each of KINDS.

    Kernel times are the profiler's, averaged over ``repetitions``; the total is the median time of a step without the
    profiler. The rest is Python, autograd and dispatch; on CUDA it is the time in which the device is idle.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    whole = []
    for _ in range(repetitions):
        _wait(device)
        start = time.perf_counter() if device == "cuda" else time.process_time()
        step()
        _wait(device)
        whole.append((time.perf_counter() if device == "cuda" else time.process_time()) - start)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with quiet(), profile(activities=activities) as watched:
        for _ in range(repetitions):
            step()
        _wait(device)
    spent = dict.fromkeys(KINDS, 0.0)
    for event in watched.key_averages():
        if device == "cuda" and event.device_type == torch.autograd.DeviceType.CUDA:
            spent[kind_of(event.key)] += 1e-6 * event.self_device_time_total / repetitions
        elif device != "cuda":
            spent[kind_of(event.key)] += 1e-6 * event.self_cpu_time_total / repetitions
    middle = statistics.median(whole)
    spent[KINDS[-1]] = 0.0
    spent[KINDS[-1]] = max(middle - sum(spent.values()), 0.0)
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()}


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a step's matrix products and attentions, as torch counts them.

    Attention is counted for every pair of positions, masked or not; its backward pass includes recomputed scores.
    """
    from torch.utils import flop_counter

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def attention_backward(g: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(g, q, k, v)

    on_cpu = {  # not counted by torch
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        step()
    return counter.get_total_flops()


def floor_flops(shape: Shape, task: str, *, cached: bool = False) -> int:
    """The minimum of operations per example that the exact mathematics requires.

    Shared parts are computed once; logits and the last layer's queries, output and MLP only where a response token is
    predicted; attention only for visible pairs of positions; no gradients of frozen weights.
    """
    s = shape
    prefix = s.image_tokens + s.prompt
    packed, noised = prefix + 2 * s.response, prefix + s.response
    base = 4 * s.width**2 + 3 * s.width * s.inner  # per layer
    adapter = s.lora * (4 * 2 * s.width + 3 * (s.width + s.inner))
    in_part = 2 * s.width**2 + 3 * s.width * s.inner  # the last layer's, for predicting positions only
    adapter_in_part = s.lora * (2 * 2 * s.width + 3 * (s.width + s.inner))

    projector = 2 * s.image_tokens * s.vision_width * s.width  # its first layer; the second is square

    def pairs(length: int, hidden: int = 0) -> int:
        return length * (length + 1) // 2 - hidden

    def linear(tokens: int, predicting: int, adapters: int) -> int:
        whole, part = base + adapters * adapter, in_part + adapters * adapter_in_part
        through = tokens * s.layers * whole - (tokens - predicting) * part
        return 2 * through + 2 * predicting * s.width * s.vocabulary

    def forward(tokens: int, visible: int, predicting: int, *, adapted: bool) -> int:
        attention = 4 * s.layers * visible * s.width
        return linear(tokens, predicting, int(adapted)) + attention + projector + 2 * s.image_tokens * s.width**2

    def backward(tokens: int, visible: int, predicting: int) -> int:
        """Gradients of all inputs, and of the weights of adapter and projector."""
        attention = 8 * s.layers * visible * s.width
        return linear(tokens, predicting, 2) + attention + projector + 4 * s.image_tokens * s.width**2

    patches = s.image_tokens + 1
    vision = (s.vision_layers - 1) * (2 * patches * 12 * s.vision_width**2 + 4 * patches**2 * s.vision_width)
    vision += 2 * s.image_tokens * 3 * s.patch**2 * s.vision_width
    # y_l does not see y_w
    clean = packed, pairs(packed, s.response**2), 2 * s.response - 1
    distorted = noised, pairs(noised), s.response
    total = vision + forward(*clean, adapted=True) + backward(*clean)
    total += 0 if cached else forward(*clean, adapted=False)
    if task != "stage 1":
        total += vision + forward(*distorted, adapted=True) + forward(*distorted, adapted=False)
        total += backward(*distorted) if task == "eq5" else 0
    return total
