"""Estimates of the device memory that training needs; what follows from them: recomputation, and the largest batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from povid.fault import Fault
from povid.training.datamodule import PreferenceBatch, PreferenceDataModule
from povid.training.module import POVIDModule

log = logging.getLogger(__name__)

SPARE = 0.1  # share of the device's memory left for fragmentation, libraries and, on a CPU, other programs
TRANSIENT = 1.5  # on a CPU: peak of a backward pass, which adds gradients to the kept activations


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory in bytes.

    ``weights``: all parameters; ``adapter``: gradients and Adam's two moments of the trained ones; ``step``:
    activations of one step; ``free`` and ``total``: the device's memory before the run has allocated any;
    ``recomputed``: whether activations are computed again in the backward pass; ``why``: what that was decided by.
    """

    weights: int
    adapter: int
    step: int
    free: int
    total: int
    recomputed: bool = False
    why: str = ""

    def __str__(self) -> str:
        said = (
            f"weights {_readable(self.weights)}, gradients and Adam {_readable(self.adapter)}, a step of the "
            f"longest records about {_readable(self.step)}; together {_readable(self.needed)}, and the device has "
            f"{_readable(self.free)} free of {_readable(self.total)}"
        )
        return f"{said}; gradient checkpointing is on{self.why}" if self.recomputed else said

    @property
    def needed(self) -> int:
        return self.weights + self.adapter + self.step

    def record(self) -> dict[str, int]:
        """What stage.json keeps of it: bytes."""
        return {"weights": self.weights, "adapter": self.adapter, "step": self.step, "needed": self.needed}


def _readable(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def fit(module: POVIDModule, data: PreferenceDataModule, batch_size: int) -> Needs:
    """Estimate the memory of training; turn gradient checkpointing on where a step would not fit without it.

    ``model.gradient_checkpointing`` must leave that open (None).

    Raises:
        Fault: on CUDA, if a step does not fit all the same.
    """
    policy, why = module.policy, ", since a step does not fit without it"
    if policy.settings.gradient_checkpointing is not None or policy.recomputes:
        return estimate(module, data, batch_size)
    room = _room(_device(module))
    with suppress(torch.OutOfMemoryError):
        needs = _estimate(module, data, batch_size)
        if needs.adapter + needs.step <= room:
            return needs
        why = f", since a step takes about {_readable(needs.step)} without it"
    policy.recompute(True)
    return replace(estimate(module, data, batch_size), why=why)


def estimate(module: POVIDModule, data: PreferenceDataModule, batch_size: int) -> Needs:
    """Estimate the memory of training from a forward pass of the longest records (on CUDA, forward and backward).

    Raises:
        Fault: on CUDA, if the pass does not fit.
    """
    try:
        return _estimate(module, data, batch_size)
    except torch.OutOfMemoryError:
        cure = "" if module.policy.recomputes else ", or set model.gradient_checkpointing=true"
        raise Fault(
            f"a step of {batch_size} records does not fit into the device's memory "
            f"({_readable(device_memory(_device(module))[0])} free); use a smaller stages.N.batch_size with "
            f"accumulate{cure}"
        ) from None


def _estimate(module: POVIDModule, data: PreferenceDataModule, batch_size: int) -> Needs:
    policy, on_cuda = module.policy, _device(module).type == "cuda"
    weights = sum(p.nbytes for p in policy.parameters())
    trained = [p for group in policy.trained_parameters() for p in group]
    adapter = sum(p.nbytes + 8 * p.numel() for p in trained)
    if on_cuda:
        torch.cuda.empty_cache()
    free, total = device_memory(_device(module))
    taken = weights if on_cuda else 0  # already allocated
    batch = longest(module, data, batch_size)
    with _restored(module):
        step = _peak_on_cuda(module, batch) if on_cuda else _peak_on_a_cpu(module, batch)
    return Needs(weights, adapter, step, free + taken, total, policy.recomputes)


def largest_batch(module: POVIDModule, data: PreferenceDataModule) -> int:
    """The largest batch size, a power of two and at most the number of records, whose step fits into memory.

    On CUDA sizes are tried with the longest records and Adam's memory set aside; on a CPU the size is computed from
    the memory of one record. Where not even one record fits, gradient checkpointing is turned on unless
    ``model.gradient_checkpointing`` is false.

    Raises:
        Fault: not even one record fits.
    """
    policy = module.policy
    size = _most_records(module, data)
    if size < 1 and not policy.recomputes and policy.settings.gradient_checkpointing is None:
        policy.recompute(True)
        size = _most_records(module, data)
    if size < 1:
        cures = [
            *(() if policy.recomputes else ["model.gradient_checkpointing=true"]),
            *(["model.dtype=bfloat16"] if policy.settings.dtype in ("float32", "float64") else []),
        ]
        cure = f"set {' or '.join(cures)}" if cures else "set model.quantize=4bit or train a smaller model"
        raise Fault(f"not even one record fits into the device's memory; {cure}")
    return 2 ** (size.bit_length() - 1)


def _most_records(module: POVIDModule, data: PreferenceDataModule) -> int:
    """How many records of a batch fit; on CUDA a power of two."""
    device, records = _device(module), len(data.dataset)
    if device.type != "cuda":
        room, single = _room(device), estimate(module, data, 1)
        return min(int((room - single.adapter) / single.step), records)
    trained = [p for group in module.policy.trained_parameters() for p in group]
    size = 0
    while 2 * max(size, 0.5) <= records and _fits(module, data, int(2 * max(size, 0.5)), trained):
        size = int(2 * max(size, 0.5))
    return size


def _fits(module: POVIDModule, data: PreferenceDataModule, size: int, trained: Sequence[Tensor]) -> bool:
    device = _device(module)
    try:
        with _restored(module):
            spare = device_memory(device)[0] - _room(device)
            reserved = [torch.empty(8 * sum(p.numel() for p in trained) + spare, dtype=torch.uint8, device=device)]
            _peak_on_cuda(module, longest(module, data, size))
            reserved.clear()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the GPU, or of the machine: what Linux can provide without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0]), 1024 * int(lines["MemTotal"].split()[0])
    except (OSError, KeyError):  # not Linux
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def _room(device: torch.device) -> int:
    """Bytes that are free on a device and may be used."""
    free, total = device_memory(device)
    return int(free - SPARE * (total if device.type == "cuda" else free))


def kept_bytes(module: POVIDModule, batch: PreferenceBatch) -> int:
    """Bytes that the forward pass of a step keeps for its backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept with its graph would keep itself, the graph and the weights

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _loss(module, batch)
    return sum(kept.values())


def _loss(module: POVIDModule, batch: PreferenceBatch) -> Tensor:
    return module.outcome(batch)[0].loss_B.mean()


def _peak_on_a_cpu(module: POVIDModule, batch: PreferenceBatch) -> int:
    """An estimate: what is kept, with one layer computed again if activations are, and the gradients beside it."""
    kept, policy = kept_bytes(module, batch), module.policy
    if policy.recomputes:
        policy.recompute(False)
        kept += kept_bytes(module, batch) // policy.network.config.get_text_config().num_hidden_layers
        policy.recompute(True)
    return int(TRANSIENT * kept)


def _peak_on_cuda(module: POVIDModule, batch: PreferenceBatch) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=next(module.parameters()).dtype == torch.bfloat16):
        _loss(module, batch).backward()
    return torch.cuda.max_memory_allocated() - before


def longest(module: POVIDModule, data: PreferenceDataModule, count: int) -> PreferenceBatch:
    """A batch of the longest records, on the module's device."""
    order = sorted(range(len(data.lengths)), key=lambda i: data.lengths[i], reverse=True)[:count]
    return module.transfer_batch_to_device(data.collate([data.dataset[i, 0] for i in order]), _device(module), 0)


@contextmanager
def _restored(module: POVIDModule) -> Iterator[None]:
    """Restore gradients, training modes and random state afterwards, so that measuring changes no result."""
    was = {name: part.training for name, part in module.policy.named_modules()}
    with torch.random.fork_rng():
        module.policy.train()
        try:
            yield
        finally:
            for name, part in module.policy.named_modules():
                part.training = was[name]
            for parameter in module.policy.parameters():
                parameter.grad = None


def _device(module: POVIDModule) -> torch.device:
    return next(module.policy.parameters()).device
