"""Every touch of a private or undocumented part of Lightning, peft, bitsandbytes, transformers, torch and W&B.

Each function names the versions that it was checked for, which are those that pyproject.toml allows;
tests/test_internals.py fails when one of these parts moves or a bound changes. The libraries are imported inside the
functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import inspect
import json
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# --- peft ------------------------------------------------------------------------------------------------------------


def adapter_switches(model: Any) -> list[Any]:
    """The modules of a model that can ignore its adapter: LoRA layers and trained copies (peft >=0.21,<0.22)."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def ignore_adapter(switches: Iterable[Any], ignore: bool) -> None:
    """Switch an adapter off or on, and nothing else (peft >=0.21,<0.22).

    peft's own ``disable_adapter`` also sets ``requires_grad`` of every weight, which takes longer than a small model's
    forward pass. ``switches`` come from :func:`adapter_switches`.
    """
    for module in switches:
        module._disable_adapters = ignore


def trained_copies(model: Any) -> list[Any]:
    """The copies that are trained of the modules in LoraConfig's ``modules_to_save`` (peft >=0.21,<0.22)."""
    from peft.utils.other import ModulesToSaveWrapper

    return [module.modules_to_save["default"] for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def keep_input_gradients(model: Any) -> None:
    """Make four-bit layers on a CPU use products that have a gradient of their input (bitsandbytes >=0.46,<0.51)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# --- transformers ----------------------------------------------------------------------------------------------------


def attention_name(config: Any) -> str:
    """The attention that a model uses, such as ``sdpa`` or ``eager`` (transformers >=5.20,<6)."""
    return config._attn_implementation


def attention_function(config: Any) -> Any:
    """The function behind :func:`attention_name` (transformers >=5.20,<6).

    It is called with module, query, key, value, mask, ``dropout=`` and ``scaling=`` and returns (output, weights).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


def processor_class(config: Any) -> Any:
    """The processor for a model's configuration; None for a model without one (transformers >=5.20,<6)."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING.get(type(config), None)


def without_video(processor: Any) -> Any:
    """A processor class without its video part, which would need torchvision (transformers >=5.20,<6)."""
    names = [name for name in processor.get_attributes() if name != "video_processor"]
    places = list(inspect.signature(processor.__init__).parameters)[1:]

    def from_args_and_dict(cls: Any, args: Iterable[Any], *rest: Any, **options: Any) -> Any:
        args = list(args)
        if "video_processor" in places:  # some processors require an argument in its place
            args.insert(places.index("video_processor"), None)
        return super(kind, cls).from_args_and_dict(args, *rest, **options)

    content = {
        "get_attributes": classmethod(lambda cls: names),
        "from_args_and_dict": classmethod(from_args_and_dict),
        "video_processor": SimpleNamespace(num_frames=None, fps=None),  # some ask it for these, video or not
    }
    kind: Any = type(processor.__name__, (processor,), content)
    return kind


@contextmanager
def no_search_for_packing() -> Iterator[None]:
    """Inside, a decoder without a mask takes its rows as single sequences (transformers >=5.20,<6).

    Otherwise it looks in the position ids for several sequences in a row, for which the host waits for the device.
    """
    from transformers import masking_utils

    honest = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = honest


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def workspace_view(workspace: Any) -> dict[str, Any]:
    """What W&B stores of a workspace, as plain values (wandb-workspaces >=0.4,<0.5)."""
    return json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))


# --- torch -----------------------------------------------------------------------------------------------------------


def is_watched(module: Any) -> bool:
    """Whether a module has forward hooks (torch >=2.9,<2.14)."""
    return bool(module._forward_hooks)


def compiled(module: Any) -> Any:
    """What :func:`run_compiled` makes a module run, compiled for any shape when it is first called (torch >=2.9,<2.14).

    Modules of one class share what was compiled, in one variant for each way in which they are called.
    """
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # drops what the eager step drops
    torch._dynamo.config.recompile_limit = (
        64  # reference and policy, with and without mask, the last layer: more than 8
    )
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than to run uncompiled from then on
    module.compile(dynamic=True)
    return module._compiled_call_impl


def run_compiled(module: Any, call: Any) -> None:
    """Let a module run what :func:`compiled` returned, or as it is (None) (torch >=2.9,<2.14)."""
    module._compiled_call_impl = call


# --- Lightning -------------------------------------------------------------------------------------------------------


def correct_logged_step(trainer: Any) -> None:
    """Make loggers file a step under its own number (lightning >=2.6,<2.7).

    Lightning keeps a second count for them, which is one too low after some resumptions.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def begin_next_epoch(trainer: Any) -> None:
    """Let a fit that resumes from the end of an epoch continue with the next one (lightning >=2.6,<2.7).

    With ``max_steps`` Lightning takes the finished epoch for an unfinished one and counts it twice, so that the last
    epoch is never trained. To be called in ``on_train_start``.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop._restarting = False
        loop.epoch_loop.restarting = False


def validates_next(trainer: Any) -> bool:
    """Whether the validation loop runs after the batch that is just ending (lightning >=2.6,<2.7)."""
    loop = trainer.fit_loop
    return trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def script_launcher(trainer: Any) -> Any:
    """The launcher, if it starts this run's other processes by their command line; else None (lightning >=2.6,<2.7).

    It has ``procs``, the processes, and ``kill(signal)``, which sends them a signal.
    """
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, _SubprocessScriptLauncher) else None


def form_group(trainer: Any) -> Any:
    """Start a trainer's further processes and its process group before anything is fitted (lightning >=2.6,<2.7).

    A trainer that fits later finds both. Returns the launcher, whose ``procs`` were started here; None if the processes
    exist already, as under SLURM.
    """
    from lightning.pytorch import LightningModule

    strategy, launcher = trainer.strategy, script_launcher(trainer)
    strategy.connect(LightningModule())  # ModelParallelStrategy tells its module of its device mesh
    if launcher is None:
        strategy.setup_environment()
    else:
        launcher.launch(strategy.setup_environment, trainer=trainer)
    return launcher


def runs_the_script(trainer: Any) -> bool:
    """Whether each of a trainer's processes runs the whole script, not only a function (lightning >=2.6,<2.7)."""
    from lightning.pytorch.strategies import ParallelStrategy

    strategy = trainer.strategy
    own = strategy.launcher is None or script_launcher(trainer) is not None
    return isinstance(strategy, ParallelStrategy) and own


def watch_children(launcher: Any) -> None:
    """Let Lightning end this process when one that ``launcher`` started fails (lightning >=2.6,<2.7)."""
    from lightning.pytorch.strategies.launchers.subprocess_script import _launch_process_observer

    _launch_process_observer(launcher.procs)


def stop_watching_children() -> None:
    """Keep Lightning from ending this process when one that it started ends (lightning >=2.6,<2.7)."""
    threads: list[Any] = threading.enumerate()
    for thread in threads:
        if thread.name == "child-process-observer":
            thread._child_processes = []


def keep_from_saying(warnings: Iterable[str]) -> None:
    """Let W&B take warnings that it prints once for printed already (wandb >=0.31,<0.32)."""
    from wandb.errors import term

    term._printed_messages.update(f"{term.WARN_STRING} {warning}" for warning in warnings)


def replicate_over(strategy: Any, devices: int) -> None:
    """Let a ModelParallelStrategy split data over all of these devices, single layers over none.

    Its own "auto" means one data-parallel group per node (lightning >=2.6,<2.7).
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = devices, 1


# --- wandb -----------------------------------------------------------------------------------------------------------


def wandb_records(file: Path) -> Iterator[Any]:
    """The records (``Record`` of wandb.proto) in a run's file, up to what a kill tore (wandb >=0.31,<0.32).

    After seven bytes of header, blocks of 32 KiB hold fragments: a checksum (4 bytes), a length (2), a kind (1: whole,
    2: first, 3: middle, 4: last of a record), and the content.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    made: Any = wandb_internal_pb2  # its names are made when it is imported
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # too short for a fragment
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + 7 : at + 7 + size]
        if kind not in (1, 2, 3, 4) or len(part) < size:
            return
        at += 7 + size
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            record = made.Record()
            try:
                record.ParseFromString(whole)
            except DecodeError:
                return
            yield record
