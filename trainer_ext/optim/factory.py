"""From an optimizer class and its arguments to an optimizer over our parameter groups."""

from typing import Any

import torch
from torch import nn

from trainer_ext.optim.groups import assign, groups

OWN_PARAMETERS = ("params", "model", "optimizer_dict")


def brings_own_groups(optimizer_cls: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what `--optim` stands for decides on its parameters itself (GaLore, APOLLO, LOMO, factories)."""
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    return not is_class or any(key in kwargs for key in OWN_PARAMETERS)


def build_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    kwargs: dict[str, Any],
    *,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`optimizer_cls(groups, **kwargs)` with decay on matrices only.

    Args:
        model: The model to train.
        optimizer_cls: Any `torch.optim.Optimizer`.
        kwargs: Its keyword arguments, such as `lr` and `betas`.
        weight_decay: The decay of the decaying group; it wins over one in `kwargs`.
    """
    return optimizer_cls(groups(assign(model, weight_decay=weight_decay)), **kwargs)
