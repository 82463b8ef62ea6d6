"""Record any `Trainer`: what it did is read from its own methods, and nothing of it is changed."""

from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from trainer_ext.exact_loss import ExactLossMixin
from trainer_ext.parity.trajectory import Recorder, Trajectory


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
        self._watch_batches()
        self._watch_losses()
        trainer.add_callback(self)

    def finish(self) -> Trajectory:
        """The trajectory of the finished run."""
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return self.recorder.end(model, optimizer, self.evaluations)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        engine = type(self.trainer.model_wrapped).__name__
        self.recorder.begin(model, engine=engine, world_size=args.world_size)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "grad_norm" not in logs or not self._window:
            return
        self.recorder.step(
            window=self._window,
            denominator=self._denominator,
            loss=float(sum(self._losses)),
            grad_norm=float(logs["grad_norm"]),
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
            self._losses.append(loss.detach())
            return loss

        self.trainer.training_step = training_step  # type: ignore[method-assign]
