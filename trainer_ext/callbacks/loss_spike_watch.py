"""`LossSpikeWatch`: says when the logged loss leaps above what it has been.

Logged losses come in; a warning comes out, and with `"stop"` the end of the training.
"""

import math
from statistics import median
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.stateful import StatefulCallback

logger = logging.get_logger(__name__)

NORMAL = 1.4826  # the standard deviation of a normal distribution, in its median absolute deviations
LEAST = 8  # losses before anything is called a spike
FLAT = 0.01  # of the median: what a loss that hardly moves is taken to vary by


class LossSpikeWatch(StatefulCallback):
    """Warns of, or stops at, a logged loss above `median + threshold * 1.4826 * MAD` of the ones before it.

    MAD is the median absolute deviation: unlike mean and standard deviation, neither median is moved by earlier spikes
    (Leys et al. 2013, "Detecting outliers: Do not use standard deviation around the mean, use absolute deviation around
    the median"). A loss that is NaN or infinite counts as a spike. All ranks log the same number, so all decide alike.

    Args:
        threshold: In standard deviations, as it were. Spikes of pretraining stand out by far more than 10.
        window: How many logged losses are looked back on.
        action: `"warn"`, or `"stop"` to end the training too.

    Raises:
        ValueError: An option is out of its range.
    """

    OPTIONS = ("threshold", "window", "action")
    REMEMBERED = ("recent", "logged_at")

    def __init__(self, threshold: float = 10.0, window: int = 50, action: str = "warn") -> None:
        if not (threshold > 0 and window >= LEAST and action in ("warn", "stop")):
            raise ValueError(
                f"LossSpikeWatch: threshold={threshold!r} must be above 0, window={window!r} at least {LEAST}, and "
                f'action={action!r} "warn" or "stop".'
            )
        self.threshold, self.window, self.action = threshold, window, action
        self.recent: list[float] = []
        self.logged_at = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hold the loss against the ones before it."""
        if logs is None or "loss" not in logs:
            return
        loss, limit, since = logs["loss"], self.limit(), self.logged_at + 1
        self.logged_at = state.global_step
        if not loss <= limit:
            if state.is_world_process_zero:
                logger.warning(
                    f"LossSpikeWatch: the loss of steps {since} to {state.global_step} is {loss:.6g}, and the last "
                    f"{len(self.recent)} logged ones let at most {limit:.6g} be expected (their median is "
                    f"{median(self.recent):.6g})."
                )
            control.should_training_stop |= self.action == "stop"
        if math.isfinite(loss):
            self.recent = [*self.recent, loss][-self.window :]

    def limit(self) -> float:
        """The highest loss that is no spike; infinite while too few are known."""
        if len(self.recent) < LEAST:
            return math.inf
        middle = median(self.recent)
        spread = NORMAL * median(abs(loss - middle) for loss in self.recent)
        return middle + self.threshold * max(spread, FLAT * abs(middle))
