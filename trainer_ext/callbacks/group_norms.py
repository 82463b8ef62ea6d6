"""How each parameter group trains: its gradient, its weights and how far a step moves them, with each log.

The optimizer's own step is watched, by hooks before and after it: there every engine has the averaged gradients and the
weights that the step is taken on, whole, as shards of FSDP2 or as DeepSpeed's float32 partitions. Squares are summed
where they are and added up over the ranks when the Trainer logs. Only steps that will be logged are measured.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.log_entry import add_to_log
from trainer_ext.engine import base_optimizer
from trainer_ext.losses.contract import exact_dtype

# Where DeepSpeed's optimizers keep their partitions: ZeRO-1 and 2, ZeRO-3, bfloat16 with ZeRO-1.
PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")

GRADIENT, BEFORE, AFTER, MOVED = range(4)


class GroupNorms(TrainerCallback):
    """Adds to each log of the training loss, for each of the optimizer's parameter groups:

    - `grad_norm_<group>`: the 2-norm of the step's gradient before clipping, so that the squares of all groups' add up to
      that of the Trainer's `grad_norm`. It is measured after clipping, and the clipping's factor taken out again.
    - `weight_norm_<group>`: the 2-norm of the weights after the step; of DeepSpeed the float32 masters.
    - `update_ratio_<group>`: `||w_t - w_(t-1)|| / ||w_(t-1)||` of that step. Left out where all weights were 0.

    A group goes by its key `name`, or else by its number. A step that was skipped (an overflow in float16) has none. While
    a logged step is taken, the weights of this rank are in memory once more. Sums are in float64.

    Raises:
        ValueError: When training begins: the engine is FSDP1, or a mode of DeepSpeed whose weights cannot be reached.
        TypeError: When training begins: the optimizer is none of PyTorch's kind, so that its step cannot be watched.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._measuring = False
        self._measured_step = -1
        self._sums: dict[int, list[float]] = {}
        self._before: list[Tensor] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._remove_hooks()
        zero, base = getattr(optimizer, "optimizer", optimizer), base_optimizer(optimizer)
        _check_engine(model, zero, base)
        self._partitioned = any(hasattr(zero, name) for name in PARTITIONS)
        self._world_size = args.world_size
        self._clip = float(getattr(zero, "clip_grad", args.max_grad_norm) or 0.0)
        self._groups = list(base.param_groups)
        self._place = {id(group): i for i, group in enumerate(self._groups)}
        self._hooks = [base.register_step_pre_hook(self._before_step), base.register_step_post_hook(self._after_step)]

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._measuring = will_log(args, state, train_dataloader)
        if self._measuring:
            self._measured_step, self._sums = state.global_step + 1, {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        if "loss" in logs and self._sums and self._measured_step == state.global_step:
            add_to_log(state, logs, self._values(logs.get("grad_norm")))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._measuring, self._sums, self._before = [], False, {}, []

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._measuring:
            self._before = [_local(p).clone() for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Add up the squares. ZeRO steps group by group, or in parts of a group: each adds to its own."""
        if not self._measuring:
            return
        before = iter(self._before)
        for group in optimizer.param_groups:
            sums = self._sums.setdefault(self._place[id(group)], [0.0] * 4)
            for parameter in group["params"]:
                share, old, new = self._share(parameter), next(before), _local(parameter)
                gradient = None if parameter.grad is None else _local(parameter.grad)
                found = (gradient, old, new, new.to(exact_dtype(new.device)) - old)
                for quantity, tensor in enumerate(found):
                    sums[quantity] += 0.0 if tensor is None else share * _square_sum(tensor)
        self._before = []

    def _share(self, parameter: Tensor) -> float:
        """What the elements here count, so that over all ranks every element counts once."""
        if self._partitioned:
            return 1.0
        parts = 1
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            parts = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())
        return parts / self._world_size

    def _values(self, grad_norm: float | None) -> dict[str, float]:
        """What is logged: a collective. `grad_norm` is the whole gradient's, before clipping."""
        ranks = of_all_ranks(self._sums)
        names = [str(group.get("name", i)) for i, group in enumerate(self._groups)]
        if len(set(names)) < len(names):
            names = [f"{i}_{name}" for i, name in enumerate(names)]
        factor = _clipping(grad_norm, self._clip)
        values = {}
        for place, name in enumerate(names):
            sums = [math.fsum(rank[place][quantity] for rank in ranks) for quantity in range(4)]
            norms = [math.sqrt(total) if total >= 0 else math.nan for total in sums]
            if factor is not None:
                values[f"grad_norm_{name}"] = norms[GRADIENT] / factor
            values[f"weight_norm_{name}"] = norms[AFTER]
            if norms[BEFORE] > 0:
                values[f"update_ratio_{name}"] = norms[MOVED] / norms[BEFORE]
        return values


def will_log(args: TrainingArguments, state: TrainerState, train_dataloader: Any) -> bool:
    """Whether the Trainer's default flow logs after the step that begins.

    By epochs, it is the last step of one; of a stream, whose epochs have no length, it may be any.
    """
    step = state.global_step + 1
    if args.logging_first_step and step == 1:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy != IntervalStrategy.EPOCH:
        return False
    if step == state.max_steps or not has_length(train_dataloader):
        return True
    return step % max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)) == 0


def _check_engine(model: nn.Module | None, zero: Any, base: Any) -> None:
    if model is not None and any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("GroupNorms cannot tell the flat parameters of FSDP1 apart: set fsdp_version: 2.")
    name = type(zero).__name__
    if type(zero).__module__.startswith("deepspeed.runtime.") and not any(hasattr(zero, own) for own in PARTITIONS):
        raise ValueError(f"GroupNorms does not know the weights of DeepSpeed's {name}: use ZeRO-1, 2 or 3.")
    if getattr(zero, "partial_offload", 1.0) < 1.0:
        raise ValueError(
            f"GroupNorms sees one optimizer, and offload_optimizer.ratio={zero.partial_offload} makes two: set it to 1."
        )
    if not isinstance(base, Optimizer):
        raise TypeError(f"GroupNorms watches a torch.optim.Optimizer, and {type(base).__name__} is none.")


def _clipping(grad_norm: float | None, limit: float) -> float | None:
    """What clipping multiplied the gradient by; None where that is not known."""
    if limit <= 0:
        return 1.0
    if grad_norm is None or not math.isfinite(grad_norm):
        return None
    return min(1.0, limit / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


def _local(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _square_sum(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=exact_dtype(tensor.device)).square())
