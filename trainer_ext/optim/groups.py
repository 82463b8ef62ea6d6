"""Which parameter gets which settings: a table first, torch's parameter groups from it.

Weight decay pulls matrices towards zero; on biases and on the scales of normalisation layers it only fights
the training. What a parameter is, is read from its module's type and its dimension, never from its name:
name patterns miss `RobertaPreLayerNorm*` and hit every module that happens to be called `norm_proj`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

NORMALISATION = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class Assignment:
    """One row of the table: a trainable parameter and the settings of its group.

    Attributes:
        name: The parameter's name in `model.named_parameters()`.
        parameter: The parameter itself.
        group: The name of its group, `decay` or `no_decay`.
        settings: What that group carries besides the optimizer's defaults.
    """

    name: str
    parameter: nn.Parameter
    group: str
    settings: dict[str, Any]


def assign(model: nn.Module, *, weight_decay: float) -> list[Assignment]:
    """The settings of every trainable parameter, in the model's own order; a tied parameter stands once.

    Args:
        model: Any module; it is read, never changed.
        weight_decay: The decay of matrices (two or more dimensions, outside normalisation layers);
            everything else gets 0.

    Raises:
        ValueError: No parameter is trainable.
    """
    settings = {"decay": {"weight_decay": weight_decay}, "no_decay": {"weight_decay": 0.0}}
    rows = []
    for name, module, parameter in _owned_parameters(model):
        if parameter.requires_grad:
            group = "decay" if decays(module, parameter) else "no_decay"
            rows.append(Assignment(name, parameter, group, settings[group]))
    if not rows:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: every one has requires_grad=False.")
    return rows


def decays(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to `parameter`, which belongs to `module` itself."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty vector in a parameter's place
    return len(shape) >= 2 and not isinstance(module, NORMALISATION)


def groups(rows: list[Assignment]) -> list[dict[str, Any]]:
    """Torch's parameter groups, in order of appearance."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row.group, {"params": [], **row.settings})["params"].append(row.parameter)
    return list(found.values())


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, module, parameter
