"""Time, memory and operations of arms, and the least that the mathematics needs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from povid.bench.subject import Shape


def interleaved(arms: Sequence[Callable[[int], object]], *, warmups: int, repetitions: int,
                device: str) -> list[list[float]]:
    """Seconds of every repetition of every arm. The arms take turns, each time beginning with another one, so that a
    slow minute of the machine falls on all of them. An arm is called with the number of the repetition."""
    seconds: list[list[float]] = [[] for _ in arms]
    for repetition in range(-warmups, repetitions):
        for place in range(len(arms)):
            arm = (place + repetition) % len(arms)
            _wait(device)
            start = time.perf_counter()
            arms[arm](repetition % max(repetitions, 1))
            _wait(device)
            if repetition >= 0:
                seconds[arm].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return middle, low, high


def peak_bytes(step: Callable[[], object], *, device: str) -> int:
    """Most bytes that a step holds at once on top of what was there before it (weights, adapter, optimiser).

    On a CPU every allocation of torch's allocator is followed by the profiler; on CUDA the allocator's own count.
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

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in watched.profiler.kineto_results.events()
                     if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a step's matrix products and attentions, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def floor_flops(shape: Shape, task: str, *, cached: bool = False) -> int:
    """Operations per example that the exact mathematics needs: what is shared computed once, logits where a response
    token is predicted, visible pairs of positions alone in attention, no gradient of frozen weights."""
    s = shape
    prefix = s.image_tokens + s.prompt
    packed, noised = prefix + 2 * s.response, prefix + s.response
    base = s.layers * (4 * s.width**2 + 3 * s.width * s.inner)
    adapter = s.layers * s.lora * (4 * 2 * s.width + 3 * (s.width + s.inner))

    def pairs(length: int, hidden: int = 0) -> int:
        return length * (length + 1) // 2 - hidden

    def forward(tokens: int, visible: int, predicting: int, *, adapted: bool) -> int:
        linear = 2 * tokens * (base + (adapter if adapted else 0)) + 2 * predicting * s.width * s.vocabulary
        return linear + 4 * s.layers * visible * s.width + 2 * s.image_tokens * s.width * (s.vision_width + s.width)

    def backward(tokens: int, visible: int, predicting: int) -> int:  # inputs of everything, weights of the adapter
        linear = 2 * tokens * (base + 2 * adapter) + 2 * predicting * s.width * s.vocabulary
        return linear + 8 * s.layers * visible * s.width + 2 * s.image_tokens * s.width * (s.vision_width + 2 * s.width)

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
