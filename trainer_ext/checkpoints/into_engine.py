"""Whole weights and moments go into a live engine, which keeps of them what is this rank's.

    put_weights(trainer.model, trainer.optimizer, weights)
    put_moments(trainer.model, trainer.optimizer, moments)

Every rank reads the whole of one tensor at a time and takes its part of it. ZeRO holds a float32 master of each trained
weight, cut among the ranks, beside the copy that computes; both are written.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer_ext.checkpoints.moments import Moments
from trainer_ext.checkpoints.weights import Stored, Weights
from trainer_ext.engine import base_optimizer, plain_name


class Part(NamedTuple):
    """What a rank holds of a parameter that ZeRO cut.

    Attributes:
        number: Of the flat partition that it lies in, with parts of others.
        offset: Where in that it begins.
        start: Where in the flattened parameter it begins.
        length: Its numbers.
    """

    number: int
    offset: int
    start: int
    length: int

    def put(self, flat: Tensor, whole: Tensor) -> None:
        """Write this part of `whole` into a flat partition."""
        piece = whole.flatten()[self.start : self.start + self.length]
        flat[self.offset : self.offset + self.length].copy_(piece)


@torch.no_grad()
def put_weights(model: nn.Module, optimizer: Any, weights: Weights) -> None:
    """Write every parameter and persistent buffer: a collective under ZeRO-3, to be called by all ranks.

    Args:
        model: The trainer's.
        optimizer: The trainer's, which has ZeRO's masters.
        weights: By name; of tied ones, one will do.

    Raises:
        ValueError: They are not the model's, or lose digits in its type.
    """
    aliases: dict[int, list[str]] = {}
    live = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in live.items():
        aliases.setdefault(id(tensor), []).append(name)
    chosen = [next((name for name in names if name in weights), names[0]) for names in aliases.values()]
    _require_same(
        {name: weights[name].shape for name in weights if name in chosen or name not in live},
        {name: _shape(live[name]) for name in chosen},
    )
    flats = flats_of(optimizer)
    for name in chosen:
        _put_weight(name, live[name], weights[name], flats)


def put_moments(model: nn.Module, optimizer: Any, moments: Moments) -> None:
    """Have the optimizer that takes the step go on from what the checkpoint's kept of each parameter.

    Args:
        model: The trainer's.
        optimizer: The trainer's.
        moments: By the parameter's name; without an entry, it was never given a gradient.

    Raises:
        ValueError: They are of other sizes, or the parameters that ZeRO flattened together are at several steps.
    """
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, kept in moments.items():
        shapes = {key: stored.shape for key, stored in kept.items() if len(stored.shape)}
        _require_same(shapes, dict.fromkeys(shapes, _shape(parameters[name])), of=f"{name}: ")
    base = base_optimizer(optimizer)
    if flats := flats_of(optimizer):
        _put_into_flats(base, flats, parameters, moments)
        return
    held = chain.from_iterable(group["params"] for group in base.param_groups)
    number_of = {id(parameter): number for number, parameter in enumerate(held)}
    state = base.state_dict()
    state["state"] = {
        number_of[id(parameters[name])]: {key: _like(parameters[name], stored.read()) for key, stored in kept.items()}
        for name, kept in moments.items()
    }
    base.load_state_dict(state)


def _put_weight(name: str, tensor: Any, stored: Stored, flats: list[Tensor]) -> None:
    whole = stored.read()
    part = part_of(tensor)
    if part is not None:
        part.put(flats[part.number], whole)
    if not has_master(tensor):
        _require_exact(name, whole, tensor.dtype)
    if hasattr(tensor, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                tensor.copy_(whole)
        return
    tensor.copy_(_like(tensor, whole))


def _put_into_flats(base: Any, flats: list[Tensor], parameters: Mapping[str, nn.Parameter], moments: Moments) -> None:
    """ZeRO-1 to 3: the optimizer keeps its state by flat partitions, and none before its first step."""
    keys = {key for kept in moments.values() for key, stored in kept.items() if len(stored.shape)}
    numbers = _numbers(moments)
    for flat in flats:
        on = {key: number.to(flat.device) if _on_device(base) else number for key, number in numbers.items()}
        scalars = {key: number.clone() if number.is_floating_point() else number.item() for key, number in on.items()}
        base.state[flat] = {**{key: torch.zeros_like(flat) for key in sorted(keys)}, **scalars}
    for name, kept in moments.items():
        part = part_of(parameters[name])
        for key, stored in kept.items():
            if part is not None and len(stored.shape):
                part.put(base.state[flats[part.number]][key], stored.read())


def _numbers(moments: Moments) -> dict[str, Tensor]:
    """What is a number and no tensor, such as the step: one for all parameters."""
    found: dict[str, Tensor] = {}
    for name, kept in moments.items():
        for key, stored in kept.items():
            number = stored.read() if not len(stored.shape) else None
            if number is not None and not torch.equal(found.setdefault(key, number), number):
                raise ValueError(
                    f"the checkpoint's optimizer has {key} {number.item():g} for {name} and {found[key].item():g} for "
                    "others, and ZeRO keeps one for all: go on without ZeRO."
                )
    return found


def _on_device(base: Any) -> bool:
    """Whether torch's optimizer keeps its step where the parameters are."""
    return any(group.get("fused") or group.get("capturable") for group in base.param_groups)


def has_master(tensor: Any) -> bool:
    """Whether ZeRO keeps a float32 master of a parameter, on whichever rank."""
    return tensor.requires_grad and (hasattr(tensor, "ds_tensor") or hasattr(tensor, "_hp_mapping"))


def part_of(parameter: Any) -> Part | None:
    """This rank's part of a parameter's master; None where it has none."""
    if not has_master(parameter):
        return None
    if hasattr(parameter, "ds_tensor"):
        zero = parameter._z3_optimizer
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = length * torch.distributed.get_rank(parameter.ds_process_group)
        length = min(length, max(0, parameter.ds_numel - start))  # without what fills up the last
        return Part(group, offset, start, length)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Part(mapping.param_group_index, there.start, here.start, here.numel)


def flats_of(optimizer: Any) -> list[Tensor]:
    """The flat partitions of float32 masters that ZeRO-1 to 3 keep on a rank; none without it.

    Raises:
        ValueError: DeepSpeed wraps the optimizer in another way, or keeps them on NVMe.
    """
    zero = getattr(optimizer, "optimizer", optimizer)
    if zero is base_optimizer(optimizer):
        return []
    if getattr(zero, "swap_optimizer", False):
        raise ValueError("ZeRO keeps the optimizer's state on NVMe, where it cannot be put: offload it to the cpu.")
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO-1 and 2, ZeRO-3
        if (found := getattr(zero, name, None)) is not None:
            return found
    raise ValueError(f"DeepSpeed's {type(zero).__name__} is not known here: go on with ZeRO-1, 2 or 3.")


def _like(tensor: Any, whole: Tensor) -> Tensor:
    """What a rank holds of `whole`, as it does of the parameter; each rank has it, so nothing is sent."""
    if isinstance(tensor, DTensor) and whole.dim():
        return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    return whole


def _shape(tensor: Any) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)


def _require_same(saved: Mapping[str, torch.Size], live: Mapping[str, torch.Size], of: str = "") -> None:
    wrong = [
        f"{of}{name} is {_sizes(saved.get(name))} in the checkpoint and {_sizes(live.get(name))} here"
        for name in sorted(saved.keys() | live.keys())
        if saved.get(name) != live.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(wrong[:5])}{more}. Go on with the model that it was saved of."
        )


def _sizes(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _require_exact(name: str, whole: Tensor, dtype: torch.dtype) -> None:
    if whole.dtype != dtype and not torch.allclose(whole.to(dtype).to(whole.dtype), whole, 0, 0, equal_nan=True):
        raise ValueError(
            f"{name} has digits in the checkpoint ({whole.dtype}) that are lost in this run's {dtype}: load the model in "
            f"{whole.dtype}; bf16=True computes in bfloat16 all the same."
        )
