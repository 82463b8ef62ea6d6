"""The trained weights that this process holds, under every engine: to read them, and to write others in their place.

One process and DDP hold whole weights, FSDP2 a shard of each, DeepSpeed a flat partition of float32 masters, from which
it makes the weights of the forward pass. Nothing is gathered to be read; what is written is spread by the engine's own
means.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from trainer_ext.engine import plain_name


class Shards(ABC):
    """What this process holds of the trained weights.

    Attributes:
        differ: Whether the ranks hold different parts.
    """

    differ: bool

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights that the optimizer changes, by name, in its own precision: no copies."""

    @abstractmethod
    def write(self, values: dict[str, Tensor]) -> None:
        """Put `values` in the place of `weights()`, and into the forward pass. DeepSpeed's ranks do it together."""


def find_shards(model: nn.Module, optimizer: Any) -> Shards:
    """The shards of a model in training.

    Args:
        model: As a callback is given it.
        optimizer: As a callback is given it.

    Raises:
        ValueError: The engine is FSDP1, keeps its masters where they cannot be reached (NVMe), or is not known.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP1, whose flat parameters cannot be told apart: set fsdp_version: 2, as "
            "fsdp_configs/fsdp2.yaml does."
        )
    inner = getattr(optimizer, "optimizer", optimizer)
    for masters in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # ZeRO-1 and 2; with bf16
        if hasattr(inner, masters):
            return ZeroShards(inner, masters)
    if hasattr(inner, "fp32_partitioned_groups_flat"):
        return Zero3Shards(inner)
    if type(inner).__module__.startswith("deepspeed.runtime."):
        raise ValueError(
            f"DeepSpeed's {type(inner).__name__} keeps masters that are not known here: set zero_optimization.stage to 1, "
            "2 or 3 in the DeepSpeed config."
        )
    return ParameterShards(model)


class ParameterShards(Shards):
    """Parameters themselves, whole or as FSDP2 and tensor parallelism split them."""

    def __init__(self, model: nn.Module) -> None:
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()
        named = model.named_parameters()  # tied ones come once
        self._parameters = {plain_name(name): p for name, p in named if p.requires_grad}
        self.differ = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        self._reshard()
        return {name: _local(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights().items():
            weight.copy_(values[name])

    def _reshard(self) -> None:
        """After a forward pass without a backward pass FSDP2 may hold whole copies, which would be used again."""
        for module in self._sharded_modules:
            module.reshard()


class ZeroShards(Shards):
    """The float32 masters of ZeRO-1 and ZeRO-2, a flat partition for each of the optimizer's groups."""

    differ = True

    def __init__(self, zero: Any, masters: str) -> None:
        self._zero = zero
        self._masters = masters

    def weights(self) -> dict[str, Tensor]:
        return {f"partition.{i}": master.data for i, master in enumerate(getattr(self._zero, self._masters))}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        _copy(values, self.weights())
        self._zero.update_lp_params()


class Zero3Shards(Shards):
    """The float32 masters of ZeRO-3, a flat partition for each sub-group."""

    differ = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        if zero.swap_optimizer or any(flat is None for flat in zero.fp16_partitioned_groups_flat):
            raise ValueError(
                "DeepSpeed keeps the masters or the parameters on NVMe, from where they cannot be averaged at each step: "
                "offload to cpu, as ds_configs/zero3_offload.json does."
            )

    def weights(self) -> dict[str, Tensor]:
        return {f"partition.{i}": master.data for i, master in enumerate(self._zero.fp32_partitioned_groups_flat)}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        self._zero.checkpoint_event_prologue()  # small parameters, whole on each rank, give their copies up
        weights = self.weights()
        _copy(values, weights)
        for sub_group in range(len(weights)):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero.checkpoint_event_epilogue()  # and get new ones


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _copy(values: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])
