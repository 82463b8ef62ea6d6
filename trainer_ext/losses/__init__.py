"""The losses, by name. Each follows `contract.py`; a name that is not here may be an import path."""

from trainer_ext.import_path import is_import_path
from trainer_ext.losses.class_weights import class_weights
from trainer_ext.losses.contract import ConfiguredLoss, Loss, LossTerms, check_loss, import_loss
from trainer_ext.losses.cross_entropy import cross_entropy
from trainer_ext.losses.elementwise import asymmetric, bce, huber, mse
from trainer_ext.losses.focal import focal
from trainer_ext.losses.long_tail import ldam, logit_adjusted
from trainer_ext.losses.weighted_sum import WeightedSum

LOSSES: dict[str, Loss] = {
    "asymmetric": asymmetric,
    "bce": bce,
    "cross_entropy": cross_entropy,
    "focal": focal,
    "huber": huber,
    "ldam": ldam,
    "logit_adjusted": logit_adjusted,
    "mse": mse,
}

__all__ = [
    "LOSSES",
    "ConfiguredLoss",
    "Loss",
    "LossTerms",
    "WeightedSum",
    "check_loss",
    "class_weights",
    "find_loss",
    "import_loss",
]


def find_loss(name: str) -> Loss:
    """The loss called `name` in `LOSSES`, or the one that an import path names.

    Raises:
        ValueError: Neither; the message lists the choices.
    """
    if name in LOSSES:
        return LOSSES[name]
    if is_import_path(name):
        return import_loss(name)
    raise ValueError(f"loss {name!r} is not known. Choices: {', '.join(sorted(LOSSES))}, model, or an import path.")
