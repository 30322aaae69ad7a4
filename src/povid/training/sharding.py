"""FSDP2: each device keeps a share of the language model's weights, its adapter's and the trained projector's.

With ``offload`` that share, its gradients and its optimiser stay in the machine's memory, and each layer's weights are
on the device while they are used and no longer: for a card that is smaller than the model, be it the only one.

What is split is always called as a module, since it is the call that gathers its weights from all devices: the decoder
with each of its layers, and the projector's trained copy. Vision tower, embeddings, head and the reference's projector
are called in parts or from outside, and stay whole on every device.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from povid.fault import Fault
from povid.model.policy import Policy


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy over all devices, however many; a checkpoint is one file of what trains.

    Args:
        offload: keep what is split in the machine's memory.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.offload = offload

    def _get_process_group_backend(self) -> str:
        """Gradients in the machine's memory have a norm that is summed there."""
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.offload and backend == "nccl" else backend

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def model_to_device(self) -> None:
        """What is not split goes to the device; what is split is where ``shard`` has put it."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Trained weights, whole, on the first process: the frozen ones would be gathered only to be left out."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def shard(policy: Policy, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Split a policy over the devices of a mesh, in place; before its optimiser is made.

    A policy in the machine's memory goes to the device one layer at a time, so that it never has to fit there whole.

    Raises:
        Fault: its weights are in four bits.
    """
    from peft.utils.other import ModulesToSaveWrapper
    from transformers.modeling_layers import GradientCheckpointingLayer

    if policy.settings.quantize:
        raise Fault(
            f"model.quantize={policy.settings.quantize}: such weights cannot be split over devices; use "
            "trainer=ddp, or leave model.quantize at null"
        )
    options: dict[str, Any] = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    decoder = policy.network.get_decoder()
    for layer in [part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(decoder, **options, ignored_params=set(policy.network.get_input_embeddings().parameters()))
    for projector in [part for part in policy.network.modules() if isinstance(part, ModulesToSaveWrapper)]:
        fully_shard(projector.modules_to_save["default"], **options)


def whole_adapter(policy: Policy) -> dict[str, Tensor] | None:
    """A split policy's trained weights, gathered, by peft's names; None if nothing is split. All devices must ask."""
    weights = {
        name: weight
        for name, weight in policy.model.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return None
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}
