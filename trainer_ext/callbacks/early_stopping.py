"""`EarlyStopping`: end a training whose metric no longer gets better.

The metrics of each evaluation come in; `control.should_training_stop` goes out. The best value is the callback's own:
that of `Trainer` ignores `min_delta`, and is there only with `metric_for_best_model`.
"""

import math
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_first_rank
from trainer_ext.callbacks.stateful import StatefulCallback

logger = logging.get_logger(__name__)


class EarlyStopping(StatefulCallback):
    """Stops when the metric has not improved by more than `min_delta` for `patience` evaluations in a row.

    Improvement is measured from the best value so far, so that many small steps count once they add up to more than
    `min_delta`. A value that is not finite is no improvement. A step counts once, however often it is evaluated, and
    evaluations outside of `train()` do not count. Rank 0's value decides on all ranks. A resumed run goes on with the
    best value and the count of its checkpoint.

    With several evaluation datasets `metric` names that of one, such as `eval_news_loss`; the others are passed over.

    Args:
        metric: Its name, with or without `eval_`. Default: `args.metric_for_best_model`, else `eval_loss`.
        patience: Evaluations in a row without improvement, after which the training stops.
        min_delta: What a value must be better by, in units of the metric.
        mode: `"min"` where less is better, `"max"` where more is. Default: `args.greater_is_better` for
            `args.metric_for_best_model`; for another metric by its name, `"min"` if it ends with `loss`.

    Attributes:
        best: The best value so far, None before the first.
        best_step: The optimizer step that it was measured at.
        evaluations_without_improvement: How many there were since.

    Raises:
        ValueError: An option is out of its range; nothing is evaluated (`eval_strategy="no"`); or an evaluation has no
            such metric.
    """

    OPTIONS = ("metric", "patience", "min_delta", "mode")
    REMEMBERED = ("best", "best_step", "evaluations_without_improvement", "last_step")

    def __init__(
        self, metric: str | None = None, patience: int = 3, min_delta: float = 0.0, mode: str | None = None
    ) -> None:
        if metric == "":
            raise ValueError(
                "EarlyStopping: metric='' names none. Leave it out for metric_for_best_model or eval_loss."
            )
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(
                f"EarlyStopping: patience={patience!r} must be a whole number of evaluations, at least 1."
            )
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping: min_delta={min_delta!r} must be a finite number, at least 0.")
        if mode not in (None, "min", "max"):
            raise ValueError(f'EarlyStopping: mode={mode!r} must be "min", "max" or left out.')
        self.metric = metric
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.best: float | None = None
        self.best_step: int | None = None
        self.evaluations_without_improvement = 0
        self.last_step: int | None = None
        self._training = False
        self._seen: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the checkpoint remembers, after a look at whether anything will be evaluated."""
        super().on_train_begin(args, state, control, **kwargs)
        if args.eval_strategy == "no":
            raise ValueError('EarlyStopping: eval_strategy="no" evaluates nothing. Set it to "steps" or "epoch".')
        self._training = True
        self._seen = set()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count this evaluation, and stop where it was the last of `patience`."""
        found = metrics or {}
        if not self._training or not any(name.startswith("eval_") for name in found):
            return
        name = self._name(args)
        present, value = of_first_rank([name in found, float(found.get(name, math.nan))], args.device)
        self._seen |= {name} if present else found.keys()
        if not present:
            return
        if state.global_step != self.last_step:
            self.last_step = state.global_step
            self._count(value, state.global_step, greater=self._greater_is_better(args))
        if self.evaluations_without_improvement >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                best = (
                    "none was finite" if self.best is None else f"the best was {self.best:g} at step {self.best_step}"
                )
                logger.warning(
                    f"EarlyStopping ends the training after step {state.global_step}: {name}={value:g} is evaluation "
                    f"{self.evaluations_without_improvement} in a row without improvement ({best})."
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """By now all datasets of an evaluation have been seen."""
        self._check_seen(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluations from here on are the user's own."""
        self._training = False
        self._check_seen(args)

    def _count(self, value: float, step: int, *, greater: bool) -> None:
        gain = 0.0 if self.best is None else (value - self.best) * (1 if greater else -1)
        if math.isfinite(value) and (self.best is None or gain > self.min_delta):
            self.best, self.best_step = value, step
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1

    def _check_seen(self, args: TrainingArguments) -> None:
        seen, self._seen = self._seen, set()
        if seen and self._name(args) not in seen:
            raise ValueError(
                f"EarlyStopping: the evaluation has no metric {self._name(args)!r}. It has: {', '.join(sorted(seen))}. "
                "Name one of them as EarlyStopping(metric=...)."
            )

    def _name(self, args: TrainingArguments) -> str:
        return _with_prefix(self.metric or args.metric_for_best_model or "loss")

    def _greater_is_better(self, args: TrainingArguments) -> bool:
        if self.mode is not None:
            return self.mode == "max"
        name = self._name(args)
        chosen = args.metric_for_best_model
        if chosen is not None and args.greater_is_better is not None and name == _with_prefix(chosen):
            return args.greater_is_better
        return not name.endswith("loss")


def _with_prefix(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"
