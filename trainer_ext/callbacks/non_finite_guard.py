"""`NonFiniteGuard`: a loss or gradient that is NaN or infinite never changes a weight.

Gradients come in at the end of each step's backward pass, and whether they are finite is known before the optimizer sees
them. So nothing poisoned is ever saved. Where the run is to end and the optimizer can leave out a step on the device, it
leaves out that step and all after it, and the host looks when it logs or saves; else the host decides in each step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.agreement import largest_of_all, several_processes
from trainer_ext.callbacks.bad_step import NONE, Seen, describe
from trainer_ext.callbacks.gradient_check import (
    BadGradient,
    first_bad_gradient,
    gradient_norms,
    names_of_gradients,
    watch_zero,
    whole_gradient,
)
from trainer_ext.callbacks.log_entry import add_to_log
from trainer_ext.callbacks.micro_batches import MicroBatches
from trainer_ext.callbacks.stateful import StatefulCallback

logger = logging.get_logger(__name__)

LOOKS = 100  # steps after which the host looks, where nothing is logged
UNKNOWN = "not known with this optimizer of DeepSpeed's"


class NonFiniteError(FloatingPointError):
    """A step's loss or gradient is NaN or infinite; the weights are those before it."""


class NonFiniteGuard(StatefulCallback):
    """Raises at, or leaves out, each step whose loss or gradient is not finite, on all ranks alike.

    A step that is left out changes no weight and nothing that the optimizer keeps, and the learning rate does not move
    on. `state.global_step` does, and the samples are used up. `optimizer.step_was_skipped` is True until the next step
    begins, for callbacks that average weights. Buffers that a forward pass updates, such as the statistics of batch
    norm, have been updated.

    It costs one pass over the gradient each step, and none where `CustomTrainer` shows it the norms of its clipping.
    With `"raise"`, torch's fused optimizers and whole gradients (one process, DDP) the device decides, by the
    `found_inf` that `torch.amp.GradScaler` sets too, and the host looks when it logs, evaluates or saves, and every
    100 steps; no step after the bad one is applied. Else the host waits for a number. One process on a CPU, where a look
    waits for nobody, leaves to the device only what its look finds not finite.

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
        self._found_inf: Tensor | None = None  # shape (), where the device decides
        self._now: tuple[Tensor, Tensor] | None = (
            None  # of the step that is on: whether it is bad, and the norms of its gradients
        )
        self._seen: list[Seen] = []
        self._names: list[str] = []
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
        if self.action == "raise" and zero is None and _decides_on_the_device(optimizer.optimizer):
            self._found_inf = torch.zeros((), device=args.device)
            self._undo.append(partial(vars(optimizer.optimizer).pop, "found_inf", None))
        if zero is not None:
            self._undo.append(watch_zero(zero, self._found, model))
            self._micro_batches = MicroBatches(model, None)
        else:

            def after_backward() -> None:
                if optimizer.gradient_state.sync_gradients:
                    self._judge(gradient_norms(model), model, args)

            self._micro_batches = MicroBatches(model, after_backward)
        self._undo.append(self._micro_batches.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new step: nothing is known of it."""
        self._is_bad, self._first, self._now = None, UNKNOWN, None
        _mark_skipped(kwargs["optimizer"], False)
        cast(MicroBatches, self._micro_batches).begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next micro-batch of the step."""
        cast(MicroBatches, self._micro_batches).begin_micro_batch()

    def see_norms(self, norms: Tensor, model: nn.Module, args: TrainingArguments) -> None:
        """Take the norms of a step's gradients from who has them before clipping; then the guard computes none of its own.

        Args:
            norms: Shape (parameters with a gradient,), in the model's order.
            model: The one whose gradients they are.
            args: Of the training.
        """
        micro_batches = cast(MicroBatches, self._micro_batches)
        micro_batches.calls_back = self._found_inf is None
        if not micro_batches.calls_back and self._is_bad is None and self._now is None:
            self._judge(norms, model, args)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise, or put a step that does nothing in the place of the optimizer's; DeepSpeed has left it out by now."""
        model, optimizer = cast(nn.Module, kwargs["model"]), kwargs["optimizer"]
        if hasattr(optimizer.optimizer, "overflow"):
            self._is_bad = optimizer.step_was_skipped
        elif self._is_bad is None and self._now is None:
            cast(MicroBatches, self._micro_batches).calls_back = True
            self._judge(gradient_norms(model), model, args)
        if self._now is not None:
            self._leave_it_to_the_device(state, optimizer.optimizer, self._now)
            return
        if not self._is_bad:
            self.consecutive = 0
            return
        seen = Seen(state.global_step + 1, state.epoch, cast(MicroBatches, self._micro_batches).flags, self._first)
        message = describe(args, seen, kwargs["train_dataloader"], self._began_in, in_a_row=self.consecutive + 1)
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look back, where something is about to be logged or kept."""
        kept = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if self._seen and (kept or len(self._seen) >= LOOKS):
            self._look_back(args, kwargs["train_dataloader"])

    on_epoch_end = on_step_end

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

    def _is_plainly_finite(self, norms: Tensor) -> bool:
        """Whether the step is finite by a look that waits for nobody: in one process on a CPU, with no bad step before it
        and no loss of the model's own to judge."""
        flags = cast(MicroBatches, self._micro_batches).flags
        alone = norms.device.type == "cpu" and not several_processes()
        return alone and not self._seen and not flags.losses and math.isfinite(norms.sum().item())

    def _judge(self, norms: Tensor, model: nn.Module, args: TrainingArguments) -> None:
        if self._is_plainly_finite(norms):
            self._is_bad = False
            return
        bad = ~norms.isfinite().all().to(args.device)
        if (loss_is_bad := cast(MicroBatches, self._micro_batches).a_loss_is_not_finite()) is not None:
            bad = bad | loss_is_bad.to(args.device)
        bad = largest_of_all(bad.int())
        if self._found_inf is not None:
            self._now = bad, norms
            if len(self._names) != len(norms):
                self._names = names_of_gradients(model)
            return
        self._is_bad = bool(bad.item())
        if self._is_bad:
            self._found(first_bad_gradient(model, whole_gradient))

    def _leave_it_to_the_device(self, state: TrainerState, optimizer: Any, now: tuple[Tensor, Tensor]) -> None:
        """Have the fused kernel do nothing, from the first bad step on."""
        bad, norms = now
        assert self._found_inf is not None
        self._found_inf = torch.maximum(self._found_inf, bad)
        optimizer.found_inf = self._found_inf
        flags = cast(MicroBatches, self._micro_batches).flags
        self._seen.append(Seen(state.global_step + 1, state.epoch, flags, (self._names, norms), bad))

    def _look_back(self, args: TrainingArguments, loader: Any) -> None:
        seen, self._seen = self._seen, []
        bad = torch.stack([one.bad for one in seen]).tolist()
        if 1 not in bad:
            return
        self._remove_hooks()
        one, since = seen[bad.index(1)], len(bad) - 1 - bad.index(1)
        raise NonFiniteError(describe(args, one, loader, self._began_in, since=since))

    def _found(self, first: BadGradient | None) -> None:
        self._first = str(first) if first is not None else NONE

    def _remove_hooks(self) -> None:
        self._found_inf, self._seen = None, []
        while self._undo:
            self._undo.pop()()


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


def _decides_on_the_device(optimizer: Any) -> bool:
    """Whether its kernel leaves out a step where `found_inf` is 1: torch's fused ones, over tensors that are whole."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not any(
        isinstance(p, DTensor) for p in parameters
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
