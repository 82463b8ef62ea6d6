"""Extends the Hugging Face Trainer without breaking its arithmetic.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_ext import manual_loop, parity
    from trainer_ext.arguments import CustomTrainingArguments
    from trainer_ext.callbacks.early_stopping import EarlyStopping
    from trainer_ext.callbacks.ema import EMACallback
    from trainer_ext.callbacks.gradual_unfreezing import GradualUnfreezing
    from trainer_ext.callbacks.group_norms import GroupNorms
    from trainer_ext.callbacks.loss_spike_watch import LossSpikeWatch
    from trainer_ext.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
    from trainer_ext.callbacks.run_summary import RunSummary
    from trainer_ext.callbacks.stop_on_signal import StopOnSignal
    from trainer_ext.callbacks.throughput import Throughput
    from trainer_ext.callbacks.time_limit import TimeLimit
    from trainer_ext.checkpoints.resume import BadCheckpointError
    from trainer_ext.checkpoints.trainer import SafeCheckpointsMixin
    from trainer_ext.checkpoints.trusted import UntrustedPickleError
    from trainer_ext.checkpoints.write import CheckpointNotSavedError
    from trainer_ext.drawn_orders import ClassBalancedOrder, WeightedOrder
    from trainer_ext.exact_loss import ExactLossMixin
    from trainer_ext.fast import fast_profile
    from trainer_ext.losses import LOSSES, LossTerms, class_weights
    from trainer_ext.lost_ranks import RankLostError
    from trainer_ext.lr_finder import find_learning_rate
    from trainer_ext.samplers import LengthGroupedOrder
    from trainer_ext.token_budget import TokenBudgetBatches
    from trainer_ext.trainer import CustomTrainer

__version__ = "0.1.0"

__all__ = [
    "BadCheckpointError",
    "CheckpointNotSavedError",
    "ClassBalancedOrder",
    "CustomTrainer",
    "CustomTrainingArguments",
    "EMACallback",
    "EarlyStopping",
    "ExactLossMixin",
    "GradualUnfreezing",
    "GroupNorms",
    "LOSSES",
    "LengthGroupedOrder",
    "LossSpikeWatch",
    "LossTerms",
    "NonFiniteError",
    "NonFiniteGuard",
    "RankLostError",
    "RunSummary",
    "SafeCheckpointsMixin",
    "StopOnSignal",
    "Throughput",
    "TimeLimit",
    "TokenBudgetBatches",
    "UntrustedPickleError",
    "WeightedOrder",
    "class_weights",
    "fast_profile",
    "find_learning_rate",
    "manual_loop",
    "parity",
]

_HOMES = {
    "BadCheckpointError": "trainer_ext.checkpoints.resume",
    "CheckpointNotSavedError": "trainer_ext.checkpoints.write",
    "ClassBalancedOrder": "trainer_ext.drawn_orders",
    "CustomTrainer": "trainer_ext.trainer",
    "CustomTrainingArguments": "trainer_ext.arguments",
    "EMACallback": "trainer_ext.callbacks.ema",
    "EarlyStopping": "trainer_ext.callbacks.early_stopping",
    "ExactLossMixin": "trainer_ext.exact_loss",
    "GradualUnfreezing": "trainer_ext.callbacks.gradual_unfreezing",
    "GroupNorms": "trainer_ext.callbacks.group_norms",
    "LOSSES": "trainer_ext.losses",
    "LengthGroupedOrder": "trainer_ext.samplers",
    "LossSpikeWatch": "trainer_ext.callbacks.loss_spike_watch",
    "LossTerms": "trainer_ext.losses",
    "NonFiniteError": "trainer_ext.callbacks.non_finite_guard",
    "NonFiniteGuard": "trainer_ext.callbacks.non_finite_guard",
    "RankLostError": "trainer_ext.lost_ranks",
    "RunSummary": "trainer_ext.callbacks.run_summary",
    "SafeCheckpointsMixin": "trainer_ext.checkpoints.trainer",
    "StopOnSignal": "trainer_ext.callbacks.stop_on_signal",
    "Throughput": "trainer_ext.callbacks.throughput",
    "TimeLimit": "trainer_ext.callbacks.time_limit",
    "TokenBudgetBatches": "trainer_ext.token_budget",
    "UntrustedPickleError": "trainer_ext.checkpoints.trusted",
    "WeightedOrder": "trainer_ext.drawn_orders",
    "class_weights": "trainer_ext.losses",
    "fast_profile": "trainer_ext.fast",
    "find_learning_rate": "trainer_ext.lr_finder",
}


def __getattr__(name: str) -> Any:
    if name in ("manual_loop", "parity"):
        return import_module(f"trainer_ext.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
