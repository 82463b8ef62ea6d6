"""`NonFiniteGuard`: a loss or gradient that is NaN or infinite never changes a weight.

Gradients come in at the end of each step's backward pass, and the step is taken, left out, or ends the run, before the
optimizer sees it. So nothing poisoned is ever saved.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.drawn_rows import rows_of_batch
from trainer_ext.callbacks.gradient_check import (
    BadGradient,
    first_bad_gradient,
    is_bad_anywhere,
    watch_zero,
    whole_gradient,
)
from trainer_ext.callbacks.log_entry import add_to_log
from trainer_ext.callbacks.micro_batches import MicroBatches
from trainer_ext.callbacks.stateful import StatefulCallback

logger = logging.get_logger(__name__)

UNKNOWN = "not known with this optimizer of DeepSpeed's"


class NonFiniteError(FloatingPointError):
    """A step's loss or gradient is NaN or infinite; the weights are those before it."""


class NonFiniteGuard(StatefulCallback):
    """Raises at, or leaves out, each step whose loss or gradient is not finite, on all ranks alike.

    A step that is left out changes no weight and nothing that the optimizer keeps, and the learning rate does not move
    on. `state.global_step` does, and the samples are used up. `optimizer.step_was_skipped` is True until the next step
    begins, for callbacks that average weights. Buffers that a forward pass updates, such as the statistics of batch
    norm, have been updated.

    It costs one pass over the gradient and one number that the host waits for, each step.

    Args:
        action: `"raise"`, or `"skip"` to leave the step out and go on.
        max_consecutive: With `"skip"`, how many steps in a row may be left out; one more raises.

    Attributes:
        skipped_steps: How many were left out, over all parts of a resumed run; logged as `skipped_steps`.

    Raises:
        ValueError: An option is out of its range, or the run is one that cannot be guarded: fp16 (whose loss scaling
            leaves such steps out itself, and needs them), DeepSpeed without ZeRO, or `torch.nn.DataParallel`.
        NonFiniteError: In training, with the step, the first bad parameter, and the ranks, micro-batches and rows whose
            outputs are not finite.
    """

    OPTIONS = ("action", "max_consecutive")
    REMEMBERED = ("skipped_steps", "consecutive")

    def __init__(self, action: str = "raise", max_consecutive: int = 10) -> None:
        if action not in ("raise", "skip"):
            raise ValueError(f'NonFiniteGuard: action={action!r} must be "raise" or "skip".')
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise ValueError(
                f"NonFiniteGuard: max_consecutive={max_consecutive!r} must be a number of steps, at least 1."
            )
        self.action = action
        self.max_consecutive = max_consecutive
        self.skipped_steps = 0
        self.consecutive = 0
        self._is_bad: bool | None = None  # None: not looked at yet
        self._first = UNKNOWN
        self._micro_batches: MicroBatches | None = None
        self._undo: list[Callable[[], None]] = []
        self._began_in: float | None = None  # the epoch that a resume began in the middle of

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the hooks on the model."""
        super().on_train_begin(args, state, control, **kwargs)
        model, optimizer = cast(nn.Module, kwargs["model"]), kwargs["optimizer"]
        zero = optimizer.optimizer if optimizer.accelerator_state.distributed_type == "DEEPSPEED" else None
        _check_it_can_be_guarded(args, zero)
        self._remove_hooks()
        self._began_in = state.epoch // 1 if state.epoch % 1 else None
        if zero is not None:
            self._undo.append(watch_zero(zero, self._found, model))
            self._micro_batches = MicroBatches(model, None)
        else:

            def after_backward() -> None:
                if optimizer.gradient_state.sync_gradients:
                    self._look(model, args)

            self._micro_batches = MicroBatches(model, after_backward)
        self._undo.append(self._micro_batches.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new step: nothing is known of it."""
        self._is_bad, self._first = None, UNKNOWN
        _mark_skipped(kwargs["optimizer"], False)
        cast(MicroBatches, self._micro_batches).begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next micro-batch of the step."""
        cast(MicroBatches, self._micro_batches).begin_micro_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise, or put a step that does nothing in the place of the optimizer's; DeepSpeed has left it out by now."""
        model, optimizer = cast(nn.Module, kwargs["model"]), kwargs["optimizer"]
        if hasattr(optimizer.optimizer, "overflow"):
            self._is_bad = optimizer.step_was_skipped
        elif self._is_bad is None:
            self._look(model, args)
        if not self._is_bad:
            self.consecutive = 0
            return
        message = self._message(args, state, kwargs["train_dataloader"])
        if self.action == "raise" or self.consecutive == self.max_consecutive:
            self._remove_hooks()
            raise NonFiniteError(message)
        self.consecutive += 1
        self.skipped_steps += 1
        if state.is_world_process_zero:
            logger.warning(message)
        if not hasattr(optimizer.optimizer, "overflow"):
            _leave_out_next_step(optimizer)
            _mark_skipped(optimizer, True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `skipped_steps` to what is logged of the training."""
        if self.action == "skip" and logs is not None and "loss" in logs:
            add_to_log(state, logs, {"skipped_steps": self.skipped_steps})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off the model."""
        _mark_skipped(kwargs["optimizer"], False)
        self._remove_hooks()

    def _look(self, model: nn.Module, args: TrainingArguments) -> None:
        loss_is_bad = cast(MicroBatches, self._micro_batches).a_loss_is_not_finite(args.device)
        self._is_bad = is_bad_anywhere(model, loss_is_bad)
        if self._is_bad:
            self._found(first_bad_gradient(model, whole_gradient))

    def _found(self, first: BadGradient | None) -> None:
        self._first = str(first) if first is not None else "none, each element is finite"

    def _message(self, args: TrainingArguments, state: TrainerState, loader: Any) -> str:
        """What is known of the step on all ranks: a collective."""
        seen = cast(MicroBatches, self._micro_batches)
        own = _samples(args, state, loader, seen.not_finite(), self._began_in)
        where = "; ".join(part for part in of_all_ranks(own) if part)
        if not where and seen.were_seen():
            where = "All outputs of the model are finite: it came about in the backward pass"
        elif not where:
            where = "The model's outputs hold no tensor that could be watched"
        done = "Nothing of it was applied: weights and optimizer state are those before it."
        row = f" It is number {self.consecutive + 1} in a row." if self.consecutive else ""
        return (
            f"NonFiniteGuard: the loss or gradient of step {state.global_step + 1} is not finite. {done}{row} "
            f"First parameter: {self._first or 'none, each element is finite'}. {where}."
        )

    def _remove_hooks(self) -> None:
        while self._undo:
            self._undo.pop()()


def _samples(
    args: TrainingArguments, state: TrainerState, loader: Any, found: dict[int, list[int]], began_in: float | None
) -> str:
    """This rank's micro-batches that are not finite, in words; empty if all of them are."""
    parts = []
    for number, rows in sorted(found.items()):
        part = f"micro-batch {number + 1} of {args.gradient_accumulation_steps}"
        if hasattr(loader, "__len__"):
            batch = round((state.epoch % 1) * len(loader)) + number
            drawn = rows_of_batch(loader, int(state.epoch), batch) if state.epoch // 1 != began_in else None
            part += f" (batch {batch} of epoch {int(state.epoch)}, from 0)"
            if drawn is not None:
                chosen = [drawn[row] for row in rows if row < len(drawn)] or drawn
                part += f", rows {', '.join(map(str, chosen))} of the dataset"
        if rows:
            part += f", {', '.join(map(str, rows))} in the batch"
        parts.append(part)
    return f"rank {args.process_index}: {'; '.join(parts)}" if parts else ""


def _check_it_can_be_guarded(args: TrainingArguments, zero: Any) -> None:
    if args.fp16:
        raise ValueError(
            "NonFiniteGuard and fp16: its loss scaling finds the scale by steps that are not finite, and leaves them out "
            "itself. Use bf16, or leave the guard out."
        )
    if zero is not None and not hasattr(zero, "overflow"):
        raise ValueError(
            "NonFiniteGuard and DeepSpeed without ZeRO (stage 0): its engine takes every step inside the backward pass. "
            "Use ZeRO-1 or higher, or DDP."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"NonFiniteGuard and DataParallel over {args.n_gpu} GPUs in one process: launch one a GPU, with torchrun."
        )


def _leave_out_next_step(optimizer: Any) -> None:
    """Have the next call of `optimizer.step`, and no other, do nothing."""
    before = vars(optimizer).get("step")

    def step(closure: Any = None) -> None:
        if before is None:
            del optimizer.step
        else:
            optimizer.step = before

    optimizer.step = step


def _mark_skipped(optimizer: Any, skipped: bool) -> None:
    """accelerate's own mark, by which `Trainer` holds the schedule; DeepSpeed's optimizer has one of its own."""
    if not hasattr(optimizer.optimizer, "overflow"):
        optimizer._is_overflow = skipped
