"""From an optimizer's name, or its class and arguments, to an optimizer over our parameter groups."""

import ast
import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer_ext.import_path import imported, is_import_path
from trainer_ext.optim.groups import assign, groups
from trainer_ext.optim.muon import MuonWithAdamW, with_muon

OWN_PARAMETERS = ("params", "model", "optimizer_dict")
OPTIMIZERS: dict[str, type[Optimizer]] = {"muon": MuonWithAdamW}  # besides those of transformers


def find_optimizer(name: str) -> type[Optimizer]:
    """The class that `--optim NAME` means where transformers has no such name.

    Args:
        name: One of `OPTIMIZERS`, or an import path such as `torch.optim.NAdam` or `my_package.optim:Lion`.

    Raises:
        ValueError: There is none, or what the path names is no `torch.optim.Optimizer`.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if not is_import_path(name):
        raise ValueError(
            f"optim={name!r} is not known; choose a name of transformers, {', '.join(OPTIMIZERS)}, or an import path "
            "such as torch.optim.NAdam"
        )
    found = imported(name, "optim")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"optim={name!r} is no torch.optim.Optimizer")  # noqa: TRY004  # a wrong argument
    return found


def optimizer_kwargs(
    cls: type[Optimizer], options: str | None, *, lr: float, betas: tuple[float, float], eps: float
) -> dict[str, Any]:
    """The arguments of `cls`: what it takes of `lr`, `betas` and `eps`, and `optim_args`, which win.

    Args:
        cls: What is made.
        options: As transformers writes them, `"key=value, key=value"`, values as in Python, such as
            `"momentum=0.9, nesterov=True"`.
        lr: The run's learning rate.
        betas: Adam's.
        eps: Adam's.

    Raises:
        ValueError: `cls` has no such argument, or the text cannot be read.
    """
    taken = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    kwargs = {name: value for name, value in {"lr": lr, "betas": betas, "eps": eps}.items() if name in taken}
    given = _read_options(options or "")
    if wrong := [name for name in given if not (name in taken or takes_any)]:
        choices = ", ".join(name for name in taken if name not in OWN_PARAMETERS)
        raise ValueError(f"optim_args: {cls.__name__} has no {', '.join(wrong)}; it takes {choices}")
    return kwargs | given


def brings_own_groups(optimizer_cls: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what `--optim` stands for decides on its parameters itself (GaLore, APOLLO, LOMO, factories)."""
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)
    return not is_class or any(key in kwargs for key in OWN_PARAMETERS)


def build_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    kwargs: dict[str, Any],
    **options: Any,
) -> Optimizer:
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


def base_rate(optimizer_cls: type[Optimizer], kwargs: dict[str, Any]) -> float | None:
    """The learning rate of groups that have none of their own; None where the optimizer finds its rate itself."""
    if "lr" in kwargs:
        return kwargs["lr"]
    default = inspect.signature(optimizer_cls).parameters.get("lr")
    return default.default if default is not None and default.default is not inspect.Parameter.empty else None


def _read_options(text: str) -> dict[str, Any]:
    why = "a value without a key"
    try:
        call: Any = ast.parse(f"dict({text})", mode="eval").body
        if not call.args and all(word.arg for word in call.keywords):
            return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        why = str(error)
    raise ValueError(f"optim_args={text!r} must read key=value, key=value ({why})")
