"""Record any `Trainer`: what it did is read from its own methods, and nothing of it is changed."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from trainer_ext.engine import base_optimizer, parameter_groups, runs_on
from trainer_ext.exact_loss import ExactLossMixin
from trainer_ext.parity.digests import Rows, kept_rows
from trainer_ext.parity.environment import about_dataset
from trainer_ext.parity.recorder import Recorder
from trainer_ext.parity.trajectory import Trajectory
from trainer_ext.repeated_rows import UncountedBatch

RUNS_ON = ("engine", "stage", "world_size", "local_fraction")
NO_ROWS = torch.zeros(2, 0, dtype=torch.int64)


class TrainerRecorder(TrainerCallback):
    """Watches one trainer, of any subclass: `TrainerRecorder(trainer, "runs/a")` before `trainer.train()`.

    The rows and the loss of a step are seen where they are trained (`training_step`), its denominator where the trainer
    counts it (`get_batch_samples`), its gradient norm where the trainer asks for it (`_get_grad_norm`). The
    denominator is noted only of a trainer that divides by it. A run resumed from a checkpoint goes on in the same
    record.

    Args:
        trainer: Not yet in training.
        folder: Of the record, see `Trajectory`; without one it is kept in memory.
        keep_weights: Whether to keep the final weights beside the record.
    """

    def __init__(self, trainer: Trainer, folder: Path | str | None = None, *, keep_weights: bool = True) -> None:
        self.trainer = trainer
        self.recorder = Recorder(type(trainer).__name__, folder, _about(trainer), keep_weights=keep_weights)
        self._rows: list[Rows] = []
        self._denominator: Any = None
        self._losses: list[Tensor] = []
        self._grad_norm: Any = None
        self._evaluated = 0
        self._in_training_mode = False
        self._wrap("get_batch_samples", self._saw_window)
        self._wrap("training_step", self._saw_loss, before=self._sees_batch)
        self._wrap("_get_grad_norm", self._saw_norm)
        self._wrap("prediction_step", self._saw_prediction)
        trainer.add_callback(self)

    def finish(self) -> Trajectory:
        """The trajectory of the finished run."""
        return self.recorder.trajectory()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rows, self._losses = [], []
        self._optimizer = base_optimizer(self.trainer.optimizer)
        found = runs_on(self.trainer)
        on = {name: getattr(found, name) for name in RUNS_ON}
        self.recorder.begin(self._model(), runs_on=on, resumed_at=state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engines = self.trainer.is_deepspeed_enabled
        self.recorder.optimizer(self._optimizer, parameter_groups(self.trainer) if engines else None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.step_of_rows(self._rows, self._denominator, self._losses, self._grad_norm)
        self._rows, self._losses, self._grad_norm = [], [], None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.weights()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.end(self._optimizer)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        timing = ("runtime", "per_second", "preparation_time", "epoch")
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        seen = torch.tensor([self._evaluated, self._in_training_mode], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        self._evaluated, self._in_training_mode = 0, False
        if self.recorder.began:
            self.recorder.evaluation(
                {name: value for name, value in found.items() if not name.endswith(timing)},
                rows=int(seen[0]),
                expected=(about_dataset(self.trainer.eval_dataset) or {}).get("rows"),
                training=bool(seen[1]),
            )

    def _model(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _wrap(self, name: str, saw: Any, *, before: Any = None) -> None:
        """Have a method of the trainer's show `saw` its result, and `before` its arguments, whenever it is called."""
        own = getattr(self.trainer, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = own(*args, **kwargs)
            saw(result, args, kwargs)
            return result

        setattr(self.trainer, name, method)

    def _sees_batch(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
        self._rows.append(NO_ROWS if isinstance(inputs, UncountedBatch) else kept_rows(inputs))

    def _saw_window(self, result: Any, args: Any, kwargs: Any) -> None:
        _, total = result
        exact = isinstance(self.trainer, ExactLossMixin) and self.trainer.loss_is_scaled_for_ga
        self._denominator = total if exact else None

    def _saw_loss(self, result: Any, args: Any, kwargs: Any) -> None:
        self._losses.append(result.detach() if result.requires_grad else result)

    def _saw_norm(self, result: Any, args: Any, kwargs: Any) -> None:
        self._grad_norm = result

    def _saw_prediction(self, result: Any, args: Any, kwargs: Any) -> None:
        model, inputs = [*args, *(kwargs[name] for name in ("model", "inputs") if name in kwargs)][:2]
        rows = next((len(value) for value in inputs.values() if torch.is_tensor(value) and value.ndim), 0)
        self._evaluated += 0 if isinstance(inputs, UncountedBatch) else rows
        self._in_training_mode |= model.training


def _about(trainer: Trainer) -> dict[str, Any]:
    """What a trainer says of itself, for the record's header."""
    args = trainer.args
    return {
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "arguments": json.loads(args.to_json_string()),
        "dataset": {"train": about_dataset(trainer.train_dataset), "evaluation": about_dataset(trainer.eval_dataset)},
    }
