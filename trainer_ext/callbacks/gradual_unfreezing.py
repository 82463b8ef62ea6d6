"""Gradual unfreezing: the head is trained first, and the blocks below it join from the top down.

    Trainer(..., callbacks=[GradualUnfreezing()])

Leave every parameter trainable (`requires_grad`): an optimizer is made of what is trainable at the start, and never holds
what is not. Every parameter is in the optimizer from the beginning, and those whose time has not come are kept still: their
gradient is taken away before it is clipped, and an optimizer passes over a parameter without one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_ext.engine import base_optimizer
from trainer_ext.optim.depth import find_depths


class GradualUnfreezing(TrainerCallback):
    """Trains what is above the last block first, then `layers` more layers at a time, down to the embeddings.

    What is trained follows from the epoch or the step alone, so that a resumed run goes on as it would have. Depths are
    those of `trainer_ext.optim.depth`; a tied parameter begins with the lowest of its places. An Adam counts a parameter's
    steps from its first. Howard and Ruder 2018 (ULMFiT), https://arxiv.org/abs/1801.06146

    Args:
        layers: Layers that join at a time, at least 1.
        every: `"epoch"`, or optimizer steps from one joining to the next.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(self, *, layers: int = 1, every: int | str = "epoch") -> None:
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"GradualUnfreezing(layers={layers!r}): must be a whole number of layers, at least 1.")
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(
                f"GradualUnfreezing(every={every!r}): must be 'epoch' or a whole number of optimizer steps, at least 1."
            )
        self.layers = layers
        self.every = every
        self._distances: dict[nn.Parameter, int] = {}  # 0 in the head
        self._joined = 0  # the largest distance that is trained
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, and keep still what is not to be trained yet.

        Raises:
            ValueError: The engine steps parameters in flat groups, the model has no list of blocks, or the optimizer does
                not hold what is to be trained later.
        """
        self._release()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _refuse_flat_groups(model, optimizer)
        self._optimizer = base_optimizer(optimizer)
        self._distances = _distances(model, self._optimizer)
        self._joined = self._reach(state)
        for parameter in self._still():
            self._optimizer.state.pop(parameter, None)
        for parameter, distance in self._distances.items():
            if distance:
                self._handles.append(_on_gradient(parameter, partial(self._is_still, distance)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let those join whose time has come."""
        reach = self._reach(state)
        for parameter in self._still():
            if self._distances[parameter] <= reach:
                self._optimizer.state.pop(parameter, None)
        self._joined = reach

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Have the optimizer pass over what is kept still, without weight decay or moments."""
        for parameter in self._still():
            parameter.grad = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Have a checkpoint of FSDP2 complete: it does not resume from one without the state of every parameter."""
        for parameter in self._still():
            if isinstance(parameter, DTensor) and parameter not in self._optimizer.state:
                self._optimizer.state[parameter] = _empty_state(parameter, self._optimizer)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the model as any other."""
        self._release()

    def _reach(self, state: TrainerState) -> int:
        times = int(state.epoch or 0) if self.every == "epoch" else state.global_step // int(self.every)
        return times * self.layers

    def _is_still(self, distance: int) -> bool:
        return distance > self._joined

    def _still(self) -> list[nn.Parameter]:
        return [parameter for parameter, distance in self._distances.items() if self._is_still(distance)]

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._distances = [], {}


def _refuse_flat_groups(model: nn.Module, optimizer: Any) -> None:
    """Raise where parameters are stepped together, so that none of them can be passed over."""
    stages = (
        "Train in stages instead: a training for each, with what is not to move frozen before the Trainer is made (as "
        "CustomTrainingArguments' freeze does) and begun from the weights of the last one; or use DDP or FSDP2."
    )
    if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
        raise ValueError(f"GradualUnfreezing: DeepSpeed steps a group of parameters as one flat tensor. {stages}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(f"GradualUnfreezing: FSDP1 flattens parameters of several layers into one. {stages}")


def _distances(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, int]:
    """How far each trainable parameter is from the head."""
    depths = find_depths(model)
    if depths is None:
        raise ValueError(f"GradualUnfreezing: {type(model).__name__} has no list of blocks to unfreeze one by one.")
    found = {p: depths.distance(p) for p in model.parameters() if p.requires_grad}
    if not any(found.values()):
        raise ValueError(
            "GradualUnfreezing: everything below the head has requires_grad=False, and is not in the optimizer. Leave it "
            "trainable: the callback keeps it still until its time."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p in found and id(p) not in held]
    if missing:
        raise ValueError(
            f"GradualUnfreezing: {type(optimizer).__name__} does not hold {', '.join(missing[:3])} and would never train "
            "it. Pass an optimizer with every trainable parameter."
        )
    return found


def _on_gradient(parameter: nn.Parameter, is_still: Callable[[], bool]) -> RemovableHandle:
    """Take the gradient away, while `is_still`, before it is clipped.

    DDP averages every gradient, and writes it after all hooks: it is given zeros, which add nothing to the norm. FSDP2
    calls hooks when it has written a shard's gradient, which is dropped.
    """
    if isinstance(parameter, DTensor):

        def drop(written: Tensor) -> None:
            if is_still():
                written.grad = None

        return parameter.register_post_accumulate_grad_hook(drop)
    return parameter.register_hook(lambda gradient: torch.zeros_like(gradient) if is_still() else None)


def _empty_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Zeros of the form that the optimizer keeps of others; dropped before the parameter is trained."""
    of, like = max(optimizer.state.items(), key=lambda entry: entry[0].numel(), default=(parameter, {}))
    zeros = {
        name: torch.zeros_like(parameter if value.shape == of.shape else value, dtype=value.dtype)
        for name, value in like.items()
        if isinstance(value, Tensor)
    }
    return {**like, **zeros}
