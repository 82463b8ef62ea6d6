"""A learning-rate range test: a short training at rising rates, and where its loss falls fastest.

In goes a `Trainer` before its `train()`; out comes a `Finding`. The steps are the trainer's own: its data, its loss,
its accumulation and clipping, its optimizer, on all its ranks. Afterwards everything is as it was, bit for bit: the
weights, the optimizer, the schedule, all random generators and the trainer itself, so that a training that follows is
the one that would have been without the test.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from trainer_ext.as_it_was import as_it_was
from trainer_ext.engine import base_optimizer

SMOOTHING = 0.8  # the weight of a point beside the one before it or after it
DIVERGED = 4.0  # times the lowest running mean
FEWEST_STEPS = 20  # below which a slope is mostly noise

QUIET: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": False,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "skip_memory_metrics": True,
}


@dataclass(frozen=True)
class Finding:
    """What a range test found.

    Attributes:
        rates: The learning rate of each step, in the terms of `TrainingArguments.learning_rate`.
        losses: The loss of each step's rows over all ranks, before the step with that rate is taken.
        smoothed: At each step the mean of all losses, weighted by 0.8 to the power of their distance in steps. It
            looks as far ahead as back, so that it does not lag behind the rates.
        suggestion: The rate at which `smoothed` falls most steeply over the logarithm of the rate, among the rates
            up to the one where it is lowest; None where it never falls.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the rates, with the suggestion, as SVG, PNG or PDF by the path's ending."""
        from trainer_ext.metrics.pictures import drawn

        found = "no rate is suggested" if self.suggestion is None else f"{self.suggestion:.2g} is suggested"
        with drawn(Path(path), f"Learning-rate range test: {found}", (7.0, 4.0)) as axes:
            axes.plot(self.rates, self.losses, ".", markersize=3, alpha=0.5, label="loss of the step")
            axes.plot(self.rates, self.smoothed, linewidth=1.4, label="smoothed")
            if self.suggestion is not None:
                axes.axvline(self.suggestion, linestyle="--", linewidth=1, color="C3", label="suggestion")
            axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
            axes.grid(alpha=0.25)
            axes.legend(fontsize="small", frameon=False)


def find_learning_rate(trainer: Trainer, *, low: float = 1e-7, high: float = 1.0, steps: int = 100) -> Finding:
    """Train a few steps at rates that rise from `low` to `high`, and suggest one (Smith, https://arxiv.org/abs/1506.01186).

    The rates rise by the same factor each step. The test ends early where the loss is no number any more or its
    running mean is above four times the lowest one. Groups keep the ratios of their rates. The trainer's callbacks do
    not run and its schedule does not count. On several ranks (DDP) all call it, and all get the same finding.

    Args:
        trainer: Before its `train()`, or after one. It trains its model as `train()` would.
        low: The first step's rate, in the terms of `TrainingArguments.learning_rate`. Where the optimizer is passed
            or there already, it is the rate of the group with the highest one.
        high: The last step's rate.
        steps: Optimizer steps, at least 20.

    Returns:
        The finding. Nothing of it is put into the trainer: `trainer.args.learning_rate = finding.suggestion` does that.

    Raises:
        ValueError: The range is none, or the trainer runs on DeepSpeed or FSDP.
        RuntimeError: The loss of the very first step is no number.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low} and high={high}: rates must be above 0, low below high.")
    if steps < FEWEST_STEPS:
        raise ValueError(f"steps={steps}: a range test needs at least {FEWEST_STEPS}.")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise ValueError(
            f"find_learning_rate cannot give a model back that {engine} has split. Run it on one process or with DDP: the "
            "rate is that of the global batch, on any engine."
        )
    if trainer.optimizer is None and not trainer.args.learning_rate > 0:
        raise ValueError(f"learning_rate={trainer.args.learning_rate} leaves no ratio between the groups' rates.")
    rising = RisingRates([low * (high / low) ** (i / (steps - 1)) for i in range(steps)], reference_rate(trainer))
    with as_it_was(trainer), _only(trainer, rising):
        trainer.train()
    if not rising.losses:
        raise RuntimeError(f"the loss of the first step is no number, before any step with low={low} was taken.")
    rates = rising.rates[: len(rising.losses)]
    smoothed = smooth(rising.losses)
    return Finding(rates, rising.losses, smoothed, steepest(rates, smoothed))


def reference_rate(trainer: Trainer) -> float:
    """The rate that the groups' rates are multiples of."""
    if trainer.optimizer is None:
        return trainer.args.learning_rate
    return max(float(group.get("initial_lr", group["lr"])) for group in base_optimizer(trainer.optimizer).param_groups)


def smooth(losses: list[float]) -> list[float]:
    """At each point the mean of all, weighted by `SMOOTHING` to the power of their distance."""
    places = np.arange(len(losses))
    weights = SMOOTHING ** np.abs(places[:, None] - places)
    return (weights @ np.array(losses) / weights.sum(axis=1)).tolist()


def steepest(rates: list[float], smoothed: list[float]) -> float | None:
    """The rate of the steepest descent over the logarithm of the rate, up to the lowest point; None without a descent."""
    end = int(np.argmin(smoothed)) + 1
    if end < 2:
        return None
    slopes = np.gradient(smoothed[:end], np.log(rates[:end]))
    return rates[int(np.argmin(slopes))] if slopes.min() < 0 else None


class RisingRates(TrainerCallback):
    """Sets the rate of each step, notes its loss, and ends the training where it diverges."""

    def __init__(self, rates: list[float], reference: float) -> None:
        self.rates = rates
        self.losses: list[float] = []
        self._reference = reference
        self._ratios: list[float] = []
        self._running, self._weight, self._lowest = 0.0, 0.0, math.inf

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, optimizer: Any = None, **_: Any) -> None:
        groups = base_optimizer(optimizer).param_groups
        self._ratios = [float(group.get("initial_lr", group["lr"])) / self._reference for group in groups]

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, optimizer: Any = None, **_: Any) -> None:
        for group, ratio in zip(base_optimizer(optimizer).param_groups, self._ratios, strict=True):
            rate = self.rates[state.global_step] * ratio
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def on_log(self, args: Any, state: Any, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        loss = float(logs["loss"])  # of all ranks, so that all of them end at the same step
        if not math.isfinite(loss):
            control.should_training_stop = True
            return
        self.losses.append(loss)
        self._running = SMOOTHING * self._running + loss
        self._weight = SMOOTHING * self._weight + 1
        mean = self._running / self._weight
        self._lowest = min(self._lowest, mean)
        control.should_training_stop |= mean > DIVERGED * self._lowest


@contextmanager
def _only(trainer: Trainer, rising: RisingRates) -> Iterator[None]:
    """For a while `trainer` has no callback but `rising`, and arguments that write and evaluate nothing."""
    trainer.args = copy.copy(trainer.args)
    for name, value in {**QUIET, "max_steps": len(rising.rates)}.items():
        setattr(trainer.args, name, value)
    trainer.control = TrainerControl()
    model = cast(nn.Module, trainer.model)
    callbacks = [DefaultFlowCallback(), rising]
    trainer.callback_handler = CallbackHandler(
        callbacks, model, trainer.processing_class, trainer.optimizer, trainer.lr_scheduler
    )
    yield
