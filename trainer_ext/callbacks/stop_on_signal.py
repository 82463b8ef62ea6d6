"""`StopOnSignal`: a signal, or a file named STOP, ends the training after a step, with a checkpoint to go on from.

Signals of this process come in; `control.should_save` and `control.should_training_stop` go out, at one step on all ranks.
"""

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)
STOP_FILE = "STOP"
FILE = 255  # stands for the file where a signal's number is sent
EXIT_CODE = 85  # as HTCondor's manual has it for a job that has saved a checkpoint and is to be run again
ONE_PRESS = 1.0  # seconds in which a terminal and a launcher may both send what was one Ctrl-C
LOOKS = 1.0  # seconds between two looks for the file


class StopOnSignal(TrainerCallback):
    """Ends a training on SIGTERM, SIGINT, SIGUSR1, or a file `STOP` in `output_dir`, with a checkpoint.

    One process stops after the step in which it hears; several stop together after the next step that they begin: each
    sends a number while a step is on, over a gloo group on the host, and no device waits. The checkpoint is that of
    `Trainer`, whatever `save_strategy` says; an evaluation that was due is left out. A further signal changes nothing, but
    a second SIGINT (Ctrl-C) raises `KeyboardInterrupt`. In the last step the run ends by itself.

    Signals that the program ignores, or has a handler for when training begins, are left alone. Outside of the main thread
    only the file is heard. Handlers are put back when training ends; after an error in it, `put_back` does so, which
    `CustomTrainer` calls. Workers of the data loader outlive the first SIGTERM, for a cluster sends it to them too.

    Attributes:
        stopped_by: `"SIGTERM"`, `"SIGINT"`, `"SIGUSR1"` or `"STOP"` once it has ended the training, else None.
        group: Over which several ranks talk while they train.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._heard = 0
        self._interrupted: float | None = None
        self._next_look = 0.0
        self._kept: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen from now on."""
        self.put_back()
        self.stopped_by, self._heard, self._interrupted, self._next_look = None, 0, None, 0.0
        if args.world_size > 1:
            timeout = timedelta(seconds=args.ddp_timeout)
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)
            # A rank that ends at once, by an error, would close it to those that still connect.
            torch.distributed.barrier(self.group)
        if threading.current_thread() is threading.main_thread():
            free = [number for number in SIGNALS if signal.getsignal(number) in UNTOUCHED]
            self._kept = {number: signal.signal(number, self._hear) for number in free}
        loader: Any = getattr(kwargs["train_dataloader"], "base_dataloader", None)  # below accelerate's
        if signal.SIGTERM in self._kept and getattr(loader, "num_workers", 0) > 0:
            loader.worker_init_fn = _Outlives(loader.worker_init_fn)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the other ranks, while the step is on."""
        if state.is_world_process_zero:
            self._look_for_file(args)
        if self.group is not None:
            said = torch.tensor([self._heard], dtype=torch.int32)
            largest = torch.distributed.ReduceOp.MAX
            self._asked = torch.distributed.all_reduce(said, largest, self.group, async_op=True), said

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop here, where any rank has heard something."""
        heard = self._heard
        if self._asked is not None:
            work, said = self._asked
            work.wait()
            heard, self._asked = int(said), None
        if not heard or state.global_step >= state.max_steps:
            return
        self.stopped_by = STOP_FILE if heard == FILE else signal.Signals(heard).name
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        if state.is_world_process_zero:
            if heard == FILE:
                _file(args).unlink(missing_ok=True)
            logger.warning(
                f"{self.stopped_by} ends the training after step {state.global_step} of {state.max_steps}, with a "
                "checkpoint to resume from."
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an epoch's end asks for has no time; the checkpoint is there."""
        if self.stopped_by is not None:
            control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no more."""
        self.put_back()

    def put_back(self) -> None:
        """Have the handlers that were there before."""
        while self._kept:
            signal.signal(*self._kept.popitem())
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = self._asked = None

    def _hear(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            now = monotonic()
            if self._interrupted is not None and now - self._interrupted > ONE_PRESS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        if not self._heard:
            once_more = " Ctrl-C once more ends it at once." if number == signal.SIGINT else ""
            said = (
                f"{signal.Signals(number).name}: training ends at the end of a step, with a checkpoint.{once_more}\n"
            )
            os.write(2, said.encode())  # a handler may have interrupted a logger
            self._heard = number

    def _look_for_file(self, args: TrainingArguments) -> None:
        if not self._heard and (now := monotonic()) >= self._next_look:
            self._next_look = now + LOOKS
            if _file(args).exists():
                self._heard = FILE


class _Outlives:
    """A `worker_init_fn` after whose call the worker outlives one SIGTERM; the second ends it, as at the loader's end."""

    def __init__(self, before: Callable[[int], None] | None) -> None:
        self._before = before

    def __call__(self, worker: int) -> None:
        if self._before is not None:
            self._before(worker)
        signal.signal(signal.SIGTERM, _die_by_the_next)


def _die_by_the_next(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


def _file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / STOP_FILE
