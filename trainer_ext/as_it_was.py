"""Run a trainer for a while and have it as it was before, bit for bit.

In goes a `Trainer` on one process or DDP; inside the context it may train; at the end its weights, optimizer,
schedule, random generators and attributes are those of the beginning, also where an error ends it.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from trainer_ext.engine import base_optimizer

Restore = Callable[[], None]
PREPARED = ("_models", "_optimizers", "_schedulers", "_dataloaders")  # accelerate's lists


@contextmanager
def as_it_was(trainer: Trainer) -> Iterator[None]:
    """Restore all that a training of `trainer` changes.

    Weights and buffers are kept on the CPU meanwhile, once more than the training itself needs; the optimizer's and the
    schedule's state beside them, where there are any. What a dataset or a collator keeps besides random generators,
    such as the place in a stream that cannot be read again, is theirs.
    """
    restores = [
        keep_attributes(trainer),
        keep_model(cast(nn.Module, trainer.model)),
        keep_optimizer(base_optimizer(trainer.optimizer)),
        keep_stateful(trainer.lr_scheduler),
        keep_stateful(trainer.accelerator.scaler),
        keep_generators(trainer),
    ]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def keep_attributes(trainer: Trainer) -> Restore:
    """The trainer's attributes, and what accelerate has prepared for it."""
    accelerator, own = trainer.accelerator, dict(vars(trainer))
    prepared = {name: list(getattr(accelerator, name)) for name in PREPARED}

    def restore() -> None:
        vars(trainer).clear()
        vars(trainer).update(own)
        accelerator.free_memory()  # a DDP wrapper that is left alive keeps its hooks in the gradients
        for name, kept in prepared.items():
            getattr(accelerator, name)[:] = kept

    return restore


def keep_model(model: nn.Module) -> Restore:
    """Parameters, gradients, buffers and modes, and what accelerate puts on a model, such as another `forward`."""
    parameters = [(p, p.detach().to("cpu", copy=True), p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().to("cpu", copy=True))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    own = dict(vars(model))

    @torch.no_grad()
    def restore() -> None:
        vars(model).clear()
        vars(model).update(own)
        for parameter, kept, gradient in parameters:
            parameter.copy_(kept)
            parameter.grad = gradient
        for module, name, buffer, kept in buffers:
            buffer.copy_(kept)
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training

    return restore


def keep_optimizer(optimizer: Any) -> Restore:
    """An optimizer's groups and state, without the rounding of `load_state_dict`; nothing where there is none yet."""
    if optimizer is None:
        return lambda: None
    groups = [
        {name: value if name == "params" else _copied(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    state = {parameter: _copied(entry) for parameter, entry in optimizer.state.items()}

    def restore() -> None:
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore


def keep_stateful(owner: Any) -> Restore:
    """What has a `state_dict`: a schedule, a loss scaler."""
    if owner is None:
        return lambda: None
    kept = copy.deepcopy(owner.state_dict())
    return lambda: owner.load_state_dict(kept)


def keep_generators(trainer: Trainer) -> Restore:
    """The global random generators, and those that the collator, the dataset or a sampler of the trainer owns."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.accelerator.current_accelerator()
    on_device: Any = None if device is None else torch.get_device_module(device)
    states = on_device.get_rng_state_all() if hasattr(on_device, "get_rng_state_all") else None
    owned = [
        _keep_generator(value)
        for owner in vars(trainer).values()
        for value in getattr(owner, "__dict__", {}).values()
        if isinstance(value, torch.Generator | np.random.Generator | random.Random)
    ]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if states is not None:
            on_device.set_rng_state_all(states)
        for restore_one in owned:
            restore_one()

    return restore


def _keep_generator(generator: Any) -> Restore:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: cast(None, generator.set_state(state))
    if isinstance(generator, np.random.Generator):
        numbers = copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(generator.bit_generator, "state", numbers)
    kept = generator.getstate()
    return lambda: generator.setstate(kept)


def _copied(value: Any) -> Any:
    """Tensors cloned where they are, containers copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(entry) for name, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value
