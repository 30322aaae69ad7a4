"""FSDP2: each device keeps a share of the weights of the language model, its adapter and the trained projector.

With ``offload`` that share, its gradients and its optimizer state stay in the machine's memory, and a layer's weights
are on the device only while in use. A model can then be larger than the device's memory, even on a single one.

FSDP2 gathers a module's weights from all devices when the module is called. So it splits the modules that are always
called as a whole: the decoder, each of its layers, and the projector's trained copy. Vision tower, embeddings, head
and the reference's projector are used in parts or from outside, and stay whole on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from povid.fault import Fault
from povid.internals import replicate_over, trained_copies
from povid.model.policy import Policy


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy over all devices, however many; a checkpoint is one file of the trained weights.

    Args:
        offload: keep the split weights in the machine's memory.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.offload = offload

    def _get_process_group_backend(self) -> str:
        """Add gloo for offloaded gradients, whose norm is summed in the machine's memory (lightning >=2.6,<2.7)."""
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.offload and backend == "nccl" else backend

    def setup_environment(self) -> None:
        replicate_over(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def model_to_device(self) -> None:
        to_device(self.model, self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, gathered on the first process; frozen ones do not belong in a checkpoint."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move everything that is not split to a device; ``shard`` has placed the rest."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def shard(policy: Policy, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Split a policy over the devices of a mesh, in place, before its optimizer is made.

    A policy in the machine's memory moves to the device one layer at a time, so that it never has to fit there whole.

    Raises:
        Fault: the policy's weights are in four bits.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if policy.settings.quantize:
        raise Fault(
            f"model.quantize={policy.settings.quantize}: quantized weights cannot be split over devices; use "
            "trainer=ddp or model.quantize=null"
        )
    options: dict[str, Any] = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    decoder = policy.network.get_decoder()
    for layer in [part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(decoder, **options, ignored_params=set(policy.network.get_input_embeddings().parameters()))
    for projector in trained_copies(policy.network):
        fully_shard(projector, **options)


def whole_adapter(policy: Policy) -> dict[str, Tensor] | None:
    """A split policy's trained weights by peft's names, gathered; None if it is not split. All devices must call it."""
    weights = {
        name: weight
        for name, weight in policy.model.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return None
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}
