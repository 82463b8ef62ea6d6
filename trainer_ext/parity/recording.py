"""Record any `Trainer`: what it did is read from its own methods, and nothing of it is changed."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from trainer_ext.engine import base_optimizer, parameter_groups, runs_on
from trainer_ext.exact_loss import ExactLossMixin
from trainer_ext.parity.trajectory import Recorder, Trajectory, row_digests
from trainer_ext.repeated_rows import UncountedBatch

RUNS_ON = ("engine", "stage", "world_size", "local_fraction")


class TrainerRecorder(TrainerCallback):
    """Watches one trainer; `TrainerRecorder(trainer)` before `trainer.train()`, `.finish()` after it.

    The rows and the denominator of a step are seen where the trainer draws them (`get_batch_samples`), its loss
    where it is computed (`training_step`), its gradient norm in the log, which is asked for at every step. The
    denominator is noted only of a trainer that divides by it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.recorder = Recorder(type(trainer).__name__)
        self.evaluations: list[dict[str, float]] = []
        self._window: list[Any] = []
        self._denominator: float | None = None
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._runs_on: dict[str, Any] | None = None
        self._watch_batches()
        self._watch_losses()
        trainer.add_callback(self)

    def finish(self) -> Trajectory:
        """The trajectory of the finished run; a collective where several ranks trained."""
        return self.recorder.end(
            self._model(),
            base_optimizer(self.trainer.optimizer),
            self.evaluations,
            groups=parameter_groups(self.trainer),
            runs_on=self._runs_on,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.begin(self._model())

    def _model(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True
        if self._runs_on is None:
            found = runs_on(self.trainer)
            self._runs_on = {name: getattr(found, name) for name in RUNS_ON}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not self._window:
            return
        self.recorder.step_of_rows(
            in_order_of_the_loader(self._window),
            denominator=self._denominator,
            loss=self.trainer.accelerator.reduce(sum(self._losses), "mean").item(),
            grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
            learning_rates=self._rates,
        )
        self._window, self._losses = [], []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        timing = ("runtime", "per_second", "preparation_time", "epoch")
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        self.evaluations.append({name: value for name, value in found.items() if not name.endswith(timing)})

    def _watch_batches(self) -> None:
        draw = self.trainer.get_batch_samples

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            self._window, total = draw(*args, **kwargs)
            exact = isinstance(self.trainer, ExactLossMixin) and self.trainer.loss_is_scaled_for_ga
            self._denominator = float(total) if exact and total is not None else None
            return self._window, total

        self.trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    def _watch_losses(self) -> None:
        take = self.trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = take(*args, **kwargs)
            self._losses.append(loss.detach().clone())
            return loss

        self.trainer.training_step = training_step  # type: ignore[method-assign]


def in_order_of_the_loader(window: list[Any]) -> list[list[str]]:
    """The digests of the rows of a step's micro-batches on all ranks, as one process would have drawn them.

    accelerate deals the micro-batches of one order out in turn: first each rank's first, then each rank's second.
    """
    own = [[] if isinstance(batch, UncountedBatch) else row_digests(batch) for batch in window]
    if not dist.is_initialized():
        return own
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return [rows for turn in zip(*everyones, strict=True) for rows in turn]
