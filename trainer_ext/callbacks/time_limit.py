"""`TimeLimit`: end a training in time, with a checkpoint to go on from.

The clock of rank 0 comes in, `control.should_save` and `control.should_training_stop` go out, at one step on all ranks.
"""

import math
import re
from collections import deque
from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_first_rank

logger = logging.get_logger(__name__)

RECENT_STEPS = 50
LOOKS_AHEAD = 60.0  # seconds between two looks at the clock, at most


class TimeLimit(TrainerCallback):
    """Saves a checkpoint and stops before a step that might not end in time.

    The time is that of this process since training began, as a job's is: a resumed run has all of it anew. A step is
    begun if the longest of the last 50, the longest pause between two steps so far (evaluation, saving, data) and
    `margin` still fit in. The ranks talk about it about once a minute, and more often only towards the end.

    The checkpoint is that of `Trainer`, whatever `save_strategy` says. With `save_strategy="best"` an evaluation that
    is due at the last step is left out, since it would decide about the checkpoint.

    Args:
        max_time: Seconds, or a string: `"1:30:00"` (hours, minutes, seconds), `"90m"`, `"2h30m"`, `"1d12h"`, `"45s"`. What
            comes before training, such as loading a model, does not count: leave room for it.
        margin: For saving the checkpoint and leaving, as `max_time`. A save that took longer has its own time.

    Attributes:
        stopped_at: The optimizer step after which it ended the training, None if it did not.

    Raises:
        ValueError: One of them is no time, or `margin` leaves nothing of `max_time`.
    """

    def __init__(self, max_time: float | str, margin: float | str = "1m") -> None:
        self.max_time = seconds_of("max_time", max_time)
        self.margin = seconds_of("margin", margin)
        if self.max_time <= self.margin:
            raise ValueError(
                f"TimeLimit: max_time={max_time!r} leaves no time to train, with margin={margin!r} for the last checkpoint."
            )
        self.stopped_at: int | None = None
        self._began = self._step_began = self._step_ended = 0.0
        self._longest_pause = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._taken = self._next_look = 0

    @property
    def stopped_by(self) -> str | None:
        """`"max_time"` once it has ended the training."""
        return "max_time" if self.stopped_at is not None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The time begins."""
        self.stopped_at = None
        self._began = self._step_ended = monotonic()
        self._longest_pause = 0.0
        self._steps.clear()
        self._taken = 0
        self._next_look = state.global_step + 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The pause since the last step is over."""
        self._step_began = monotonic()
        self._longest_pause = max(self._longest_pause, self._step_began - self._step_ended)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where a look is due: stop here, or say when the next one is."""
        self._step_ended = monotonic()
        self._steps.append(self._step_ended - self._step_began)
        self._taken += 1
        if state.global_step < self._next_look:
            return
        passed = self._step_ended - self._began
        stop, steps = of_first_rank([*self._plan(passed)], args.device)
        self._next_look = state.global_step + int(steps)
        if stop:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
            if args.save_strategy == "best":
                control.should_evaluate = False
            if state.is_world_process_zero:
                logger.warning(
                    f"TimeLimit ends the training after step {state.global_step} of {state.max_steps}, {passed:.0f} of "
                    f"{self.max_time:.0f} seconds since it began, and saves a checkpoint to resume from."
                )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The end of a broken-off epoch is none: the checkpoint is there, and an evaluation would take more time."""
        if self.stopped_at is not None and state.epoch % 1:
            control.should_evaluate = control.should_save = False

    def _plan(self, passed: float) -> tuple[bool, int]:
        """Whether to stop now, and in how many steps to look again."""
        step = max(self._steps)
        spare = self.max_time - passed - self.margin - self._longest_pause - step
        each = max(step, passed / self._taken)
        return spare < 0, max(1, int(min(spare / 2, LOOKS_AHEAD) / each)) if each else 1


def seconds_of(name: str, time: float | str) -> float:
    """A time in seconds.

    Args:
        name: Of the option, for the error.
        time: Seconds, or a string as `TimeLimit` takes it.

    Raises:
        ValueError: It is none, or not above 0.
    """
    if isinstance(time, str):
        clock = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", time)
        units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", time)
        if clock is not None:
            days, (hours, minutes, seconds) = 0, map(int, clock.groups())
        elif units is not None and time:
            days, hours, minutes, seconds = (int(found or 0) for found in units.groups())
        else:
            raise ValueError(
                f'TimeLimit: {name}={time!r} is no time. Write "1:30:00" (hours, minutes, seconds), "90m", "2h30m", or a '
                "number of seconds without quotes."
            )
        found = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    else:
        found = float(time)
    if not 0 < found < math.inf:
        raise ValueError(f"TimeLimit: {name}={time!r} must be a time above 0.")
    return found
