"""`ExactResumeMixin`: a run that goes on from a checkpoint is the run that was not interrupted, bit for bit.

`resume.json` in a checkpoint has what the stock class forgets: the place in the epoch, whether the epoch's end (its
evaluation, its log, its callbacks) is still to come, and the loss since the last log. The stock loop is told to go on
there: an epoch all of whose steps are taken is entered once more, for its end alone. Evaluations leave the random
generators as they are, so that a training is the same with and without them.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from trainer_ext.as_it_was import keep_generators
from trainer_ext.callbacks.agreement import of_all_ranks

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

RESUME = "resume.json"


class ExactResumeMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it has that class go on exactly where a checkpoint was saved.

    Attributes:
        CARRIED: Names of attributes, with values that JSON can hold, which a checkpoint is to have besides.
    """

    CARRIED: tuple[str, ...] = ()

    _epoch = 0
    _epoch_began_at = 0  # the optimizer steps before it
    _epoch_ended = False  # its last step is taken, and its end is under way or past
    _steps_per_epoch = 0
    _heard_at = -1  # the step at which it was last asked whether to log, save and evaluate
    _of_last_step: tuple[Any, float | None] = (None, None)  # its gradient norm and learning rate

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """The epoch to go on in, and how many of its micro-batches are trained already."""
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self._steps_per_epoch = num_update_steps_per_epoch
        self._heard_at = self.state.global_step
        self._of_last_step = (None, None)
        saved = read_place(checkpoint)
        if saved is None or saved["steps_per_epoch"] != num_update_steps_per_epoch or self.args.ignore_data_skip:
            return epoch, batches
        if saved["epoch_ended"]:
            return saved["epoch"] + 1, 0
        steps = num_update_steps_per_epoch if self.state.global_step >= max_steps else saved["steps"]
        return saved["epoch"], steps * self.args.gradient_accumulation_steps

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs["resume_from_checkpoint"] if epoch == kwargs["epochs_trained"] else None
        taken = kwargs["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps if checkpoint else 0
        self._epoch, self._epoch_began_at = epoch, self.state.global_step - taken
        if checkpoint is not None:
            self._load_rng_state(checkpoint)  # the stock loop does it at the next step, which may be in another epoch
        if saved := read_place(checkpoint):
            self._take_up(saved)
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """The stock method, which is called after every step and once more at the end of an epoch."""
        self._epoch_ended = self._heard_at == self.state.global_step
        self._heard_at = self.state.global_step
        rate = kwargs.pop("learning_rate", None)
        if grad_norm is None and rate is None:
            grad_norm, rate = self._of_last_step
        self._of_last_step = (grad_norm, rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs, learning_rate=rate)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation; a training goes on as if there had been none."""
        restore = keep_generators(self)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            restore()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The stock prediction; a training goes on as if there had been none."""
        restore = keep_generators(self)
        try:
            return super().predict(*args, **kwargs)
        finally:
            restore()

    def _save_rng_state(self, output_dir: str) -> None:
        """The states of the random generators, and `resume.json`."""
        super()._save_rng_state(output_dir)
        norm, rate = self._of_last_step
        losses = of_all_ranks(self._tr_loss.item())
        steps = self.state.global_step - self._epoch_began_at
        cut_short = self.control.should_training_stop and steps < self._steps_per_epoch
        place = {
            "epoch": self._epoch,
            "steps": steps,
            "steps_per_epoch": self._steps_per_epoch,
            "epoch_ended": self._epoch_ended and not cut_short,
            "logged_at": self._globalstep_last_logged,
            "losses_since": losses,
            "grad_norm": norm.item() if isinstance(norm, torch.Tensor) else norm,
            "learning_rate": rate,
            "carried": {name: getattr(self, name) for name in self.CARRIED},
        }
        if self.args.should_save:
            (Path(output_dir) / RESUME).write_text(json.dumps(place, indent=1) + "\n")

    def _take_up(self, saved: dict[str, Any]) -> None:
        """What was not logged yet, and where the epoch began."""
        losses = saved["losses_since"]
        own = losses[self.args.process_index] if len(losses) == self.args.world_size else fmean(losses)
        self._tr_loss.fill_(own)
        self._globalstep_last_logged = saved["logged_at"]
        if saved["epoch"] == self._epoch:
            self._epoch_began_at = self.state.global_step - saved["steps"]
        self._of_last_step = (saved["grad_norm"], saved["learning_rate"])
        for name, value in saved["carried"].items():
            if name in self.CARRIED:
                setattr(self, name, value)


def read_place(checkpoint: str | Path | None) -> dict[str, Any] | None:
    """What `resume.json` says; None where there is none, as in a checkpoint of the stock class."""
    file = None if checkpoint is None else Path(checkpoint) / RESUME
    return json.loads(file.read_text()) if file is not None and file.is_file() else None
