"""From an optimizer class and its arguments to an optimizer over our parameter groups."""

import inspect
from typing import Any

import torch
from torch import nn

from trainer_ext.optim.groups import assign, groups
from trainer_ext.optim.muon import MuonWithAdamW, with_muon

OWN_PARAMETERS = ("params", "model", "optimizer_dict")


def brings_own_groups(optimizer_cls: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what `--optim` stands for decides on its parameters itself (GaLore, APOLLO, LOMO, factories)."""
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    return not is_class or any(key in kwargs for key in OWN_PARAMETERS)


def build_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    kwargs: dict[str, Any],
    **options: Any,
) -> torch.optim.Optimizer:
    """`optimizer_cls(groups, **kwargs)` over the groups that `options` describe.

    Args:
        model: The model to train.
        optimizer_cls: Any `torch.optim.Optimizer`; `MuonWithAdamW` gets the hidden matrices apart.
        kwargs: Its keyword arguments, such as `lr` and `betas`.
        options: As `assign` takes them: `weight_decay`, which wins over one in `kwargs`, `layerwise_lr_decay`,
            `head_lr_multiplier`, `rules`.
    """
    rows = assign(model, **options)
    if issubclass(optimizer_cls, MuonWithAdamW):
        rows = with_muon(rows, model)
    return optimizer_cls(groups(rows, base_rate(optimizer_cls, kwargs)), **kwargs)


def base_rate(optimizer_cls: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> float | None:
    """The learning rate of groups that have none of their own; None where the optimizer finds its rate itself."""
    if "lr" in kwargs:
        return kwargs["lr"]
    default = inspect.signature(optimizer_cls).parameters.get("lr")
    return default.default if default is not None and default.default is not inspect.Parameter.empty else None
