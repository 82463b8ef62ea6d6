"""Exponential moving average of the trained weights, which evaluations and the final model use.

    Trainer(..., callbacks=[EMACallback(decay=0.999)])

After each optimizer step the average takes up the weights. While the model is in evaluation (`model.eval()`) it has the
averages; training goes on with its own weights, bit for bit. A checkpoint keeps the weights as its model, and the
averages in a file of their own beside it; after training the model has the averages.
"""

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.averages_file import Part, find_averages, load_averages, save_averages
from trainer_ext.callbacks.shards import find_shards
from trainer_ext.callbacks.stateful import StatefulCallback
from trainer_ext.callbacks.train_and_eval import hear_modes, hear_no_more


class EMACallback(StatefulCallback):
    """Averages the trained weights over the steps: `average = d * average + (1 - d) * weight`.

    The averages begin as the weights are at the start. They are of the optimizer's own weights (float32 masters where
    the engine keeps these), in float32 or better, and held by each process for its part of the weights alone. Buffers,
    such as batch statistics, are not averaged. Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; the warm-up is
    that of `tf.train.ExponentialMovingAverage` with `num_updates`.

    Args:
        decay: d, at least 0 and below 1: an average reaches back about `every / (1 - decay)` optimizer steps.
        warmup: Whether update t, counted from 1, takes `d = min(decay, (1 + t) / (10 + t))`, so that the weights of
            the start are soon forgotten.
        every: Optimizer steps from one update to the next.

    Raises:
        ValueError: An option is out of its range.
    """

    OPTIONS = ("decay", "warmup", "every")
    REMEMBERED = ("updates", "run")

    def __init__(self, decay: float = 0.999, *, warmup: bool = True, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMACallback(decay={decay}): must be at least 0 and below 1, such as 0.999.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"EMACallback(every={every}): must be a whole number of optimizer steps, at least 1.")
        self.decay = decay
        self.warmup = warmup
        self.every = every
        self.updates = 0
        self.run = ""
        self._averages: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] | None = None  # the weights to train, while the model has the averages
        self._heard: nn.Module | None = None
        self._saved_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the weights, or with the averages of the checkpoint.

        Raises:
            ValueError: The engine's weights cannot be averaged, or the averages of the checkpoint are not found.
            RuntimeError: An earlier training ended inside an evaluation, and left averages in the model.
        """
        self._forget_a_failed_run(resumes=state.global_step > 0)
        self._saved_at = None
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        self._shards = find_shards(model, kwargs["optimizer"])
        self._part = Part(args.process_index, args.world_size) if self._shards.differ else Part(0, 1)
        self._averages = {name: _exact(weight) for name, weight in self._shards.weights().items()}
        problem = self._take_up(args, state.global_step) if state.global_step else None
        said = of_all_ranks((problem, uuid4().hex))
        if problem := next((found for found, _ in said if found is not None), None):
            raise ValueError(problem)
        self.run = said[0][1]
        hear_modes(model, self._mode_changes)
        self._heard = model

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Train the weights, whatever an evaluation left behind."""
        self._put_weights()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse gradients that are not of the weights."""
        if self._trained is not None:
            raise RuntimeError(
                "EMACallback: the model was put in evaluation, where it has the averages, and trained so. A training_step "
                "of your own calls model.train(); put only the modules in evaluation that are to be."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average, now that the weights have changed; a step that was left out (an overflow, a guard) did not."""
        if (state.global_step + 1) % self.every == 0 and not kwargs["optimizer"].step_was_skipped:
            self.updates += 1
            average(self._averages, self._shards.weights(), decay_of(self.updates, self.decay, self.warmup))

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Put the weights back before anything is saved."""
        self._put_weights()

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """Put the weights back before anything is saved."""
        self._put_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the averages into the checkpoint, where the trainer has not had it done before.

        Raises:
            RuntimeError: The checkpoint's model has the averages, or there is no such folder.
        """
        if self._saved_at == state.global_step:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not folder.is_dir():
            raise RuntimeError(
                f"EMACallback: there is no {folder} to save the averages in. A hyper-parameter search saves elsewhere: "
                "set save_strategy='no' for it."
            )
        self.save_files(folder, args, state)

    def save_files(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        """Save the averages into a checkpoint.

        Raises:
            RuntimeError: The checkpoint's model has the averages.
        """
        if self._trained is not None:
            raise RuntimeError(
                f"EMACallback: {folder} was saved inside an evaluation, and its model has the averages; do not resume from "
                "it. An evaluate() of your own ends with model.train(), also where it raises."
            )
        if self._shards.differ or args.should_save:
            save_averages(folder, self._part, self._averages, run=self.run, step=state.global_step)
        self._saved_at = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the averages in the model: the last, or with `load_best_model_at_end` those of the best checkpoint."""
        model: nn.Module = kwargs["model"]
        self._put_weights()
        hear_no_more(model)
        self._heard = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._averages = load_averages(Path(state.best_model_checkpoint), self._part, self._averages)
        find_shards(model, kwargs["optimizer"]).write(self._averages)
        self._averages = {}

    def _forget_a_failed_run(self, *, resumes: bool) -> None:
        if self._trained is not None and not resumes:
            raise RuntimeError(
                "EMACallback: an earlier train() ended inside an evaluation, and the model still has the averages. Begin "
                "with a new model, or resume from a checkpoint."
            )
        self._trained = None
        if self._heard is not None:
            hear_no_more(self._heard)
            self._heard = None

    def _take_up(self, args: TrainingArguments, step: int) -> str | None:
        """Read the checkpoint's averages; what is wrong, for all ranks to hear of it."""
        if not self.run:
            return (
                f"the checkpoint of step {step} was saved without this EMACallback: its averages are unknown. Resume with "
                "the callback's options of that run, or without the callback."
            )
        try:
            folder = find_averages(args, self._part, run=self.run, step=step)
            self._averages = load_averages(folder, self._part, self._averages)
        except ValueError as error:
            return str(error)
        return None

    def _mode_changes(self, training: bool) -> None:
        if training:
            self._put_weights()
        elif self._trained is None:
            self._trained = {name: weight.clone() for name, weight in self._shards.weights().items()}
            self._shards.write(self._averages)

    def _put_weights(self) -> None:
        if self._trained is not None:
            self._shards.write(self._trained)
            self._trained = None


def decay_of(update: int, decay: float, warmup: bool) -> float:
    """The decay of an update, counted from 1."""
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


@torch.no_grad()
def average(averages: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Take `weights` up into `averages`, in place."""
    for name, value in averages.items():
        value.lerp_(weights[name].to(value.dtype), 1 - decay)


def _exact(weight: Tensor) -> Tensor:
    """A copy in float32 or better."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
