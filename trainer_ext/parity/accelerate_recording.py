"""Record a training loop over `accelerate.Accelerator`: its batches, losses, clipping and steps, as they pass it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedOptimizerWrapper
from torch import Tensor, nn

from trainer_ext.engine import base_optimizer, count_elements, is_deepspeed, local_elements
from trainer_ext.parity.digests import Rows, kept_rows
from trainer_ext.parity.recorder import Recorder


class AccelerateRecorder:
    """Records the first model that a process trains through an `Accelerator`; `install` once, before the script runs.

    A step's rows are those of the batches drawn from prepared loaders while the model is in training mode, its loss
    the sum of what `backward` was given, divided as `backward` divides it; its denominator is not known. A
    loader's evaluations are the script's own, and not seen.

    Args:
        folder: Of the record.
        busy: Whether someone else records now, as a `Trainer` has an accelerator too.
    """

    def __init__(self, folder: Path | str, busy: Callable[[], bool] = lambda: False) -> None:
        self.recorder = Recorder("accelerate loop", folder, {"unseen": ["evaluations"]})
        self._busy = busy
        self._model: Any = None
        self._rows: list[Rows] = []
        self._losses: list[Tensor] = []
        self._grad_norm: Any = None
        self._optimizer: Any = None

    def install(self) -> None:
        """Have accelerate's classes show this recorder what passes them."""
        _after(accelerate.Accelerator, "prepare", self._prepared)
        _after(accelerate.Accelerator, "clip_grad_norm_", self._clipped)
        _before(accelerate.Accelerator, "backward", self._backward)
        for optimizer in (AcceleratedOptimizer, DeepSpeedOptimizerWrapper):
            _around_step(optimizer, self._before_step, self._after_step)
        for loader in (DataLoaderShard, DataLoaderDispatcher):
            _each(loader, self._drew)

    def finish(self) -> None:
        """Write the end of the record, if a run was seen."""
        if self._optimizer is not None:
            self.recorder.end(base_optimizer(self._optimizer))

    def _prepared(self, accelerator: Any, result: Any, *args: Any) -> None:
        models = [one for one in (result if isinstance(result, tuple) else (result,)) if isinstance(one, nn.Module)]
        if models and self._model is None and not self._busy():
            self._model = models[0]

    def _drew(self, batch: Any) -> None:
        if self._model is not None and self._model.training and not self._busy():
            self._rows.append(kept_rows(batch))

    def _backward(self, accelerator: Any, loss: Tensor, *args: Any) -> None:
        if self._model is None or self._busy():
            return
        if self._optimizer is None and not self.recorder.began:
            self.recorder.begin(accelerator.unwrap_model(self._model), runs_on=_runs_on(self._model, accelerator))
        self._losses.append(loss.detach() / accelerator.gradient_accumulation_steps)

    def _clipped(self, accelerator: Any, result: Any, *args: Any) -> None:
        self._grad_norm = result

    def _before_step(self, optimizer: Any) -> None:
        if self.recorder.began and optimizer.gradient_state.sync_gradients and not self._busy():
            self._optimizer = optimizer
            self.recorder.optimizer(base_optimizer(optimizer), [] if is_deepspeed(self._model) else None)

    def _after_step(self, optimizer: Any) -> None:
        if optimizer is self._optimizer and optimizer.gradient_state.sync_gradients and not self._busy():
            self.recorder.step_of_rows(self._rows, None, self._losses, self._grad_norm)
            self._rows, self._losses, self._grad_norm = [], [], None


def _runs_on(model: Any, accelerator: Any) -> dict[str, Any]:
    held = sum(local_elements(parameter) for parameter in model.parameters())
    return {
        "engine": type(model).__name__,
        "stage": model.zero_optimization_stage() if is_deepspeed(model) else None,
        "world_size": accelerator.num_processes,
        "local_fraction": held / count_elements(model),
    }


def _after(cls: type, name: str, saw: Callable[..., None]) -> None:
    own = getattr(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        saw(self, result, *args)
        return result

    setattr(cls, name, method)


def _before(cls: type, name: str, saw: Callable[..., None]) -> None:
    own = getattr(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        saw(self, *args)
        return own(self, *args, **kwargs)

    setattr(cls, name, method)


def _around_step(cls: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    own = cls.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        result = own(self, *args, **kwargs)
        after(self)
        return result

    cls.step = step


def _each(cls: Any, saw: Callable[[Any], None]) -> None:
    own = cls.__iter__

    def iterate(self: Any) -> Any:
        for batch in own(self):
            if torch.is_grad_enabled():
                saw(batch)
            yield batch

    cls.__iter__ = iterate
