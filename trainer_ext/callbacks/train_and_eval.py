"""Hear of a model's `train()` and `eval()`: the one thing that every evaluation does before it, and no callback is told.

`on_evaluate` comes after an evaluation, once for each of its datasets, and never where it raises.
"""

from collections.abc import Callable
from types import MethodType

from torch import nn


def hear_modes(model: nn.Module, heard: Callable[[bool], None]) -> None:
    """Have `heard(mode)` called whenever `model` is put in training (True) or evaluation (False).

    Raises:
        ValueError: Something else hears already.
    """
    model = _own(model)
    if "train" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.train is replaced already, as by a second EMACallback: keep one of them, and after a "
            "training that raised begin with a new model."
        )

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        if module is model:  # and not a copy of it
            heard(mode)
        return type(module).train(module, mode)

    model.train = MethodType(train, model)  # type: ignore[method-assign]


def hear_no_more(model: nn.Module) -> None:
    """End what `hear_modes` began."""
    vars(_own(model)).pop("train", None)


def _own(model: nn.Module) -> nn.Module:
    """The module below torch.compile's."""
    return getattr(model, "_orig_mod", model)
