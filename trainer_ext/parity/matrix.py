"""Train every mode by the reference and by a `Trainer`, and hold the two against each other."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trainer_ext.finetune import build_trainer, run_manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.parity.comparison import BITWISE, Comparison, Tolerance, compare
from trainer_ext.parity.modes import Mode
from trainer_ext.parity.recording import TrainerRecorder
from trainer_ext.parity.trajectory import Recorder, Trajectory
from trainer_ext.task import Task
from trainer_ext.trainer import CustomTrainer

# Where only the order of summation differs. AdamW can move a weight whose gradient is mathematically 0 by a share of
# the learning rate on the sign of a rounding error; hence the wide share for weights.
ROUNDING = {
    torch.float32: Tolerance("fp32", relative=1e-4, weights=0.1),
    torch.float64: Tolerance("float64", relative=1e-12, weights=1e-6),
}


@dataclass(frozen=True)
class Row:
    """One line of the matrix: a mode's run by one trainer, held against the reference.

    Attributes:
        mode: The mode's name; `stock:NAME` for the stock `Trainer`.
        error: Why there is no comparison, or None.
        dropout: Whether dropout was on.
    """

    mode: str
    tolerance: Tolerance
    dropout: bool
    error: str | None = None
    comparison: Comparison | None = None
    reference: Trajectory | None = None
    candidate: Trajectory | None = None

    @property
    def counts(self) -> bool:
        """Whether the row decides on the verdict of the whole; the stock Trainer is shown, not judged."""
        return not self.mode.startswith("stock:")

    @property
    def verdict(self) -> str:
        if self.comparison is None:
            return "failed"
        return "equal" if self.comparison.equal else "differs"


@dataclass(frozen=True)
class Matrix:
    """What all modes of a comparison share.

    Attributes:
        task: The data and the model.
        args: The training arguments; `per_device_train_batch_size` is the global batch of one step.
        folder: Where each mode leaves its trajectories.
        dtype: Of the weights.
        whole_batch: Whether the reference takes each global batch as one micro-batch. Dropout masks cannot match
            then, so dropout is 0, and numbers are held to rounding instead of bits.
        progress: Whether to show progress bars.
    """

    task: Task
    args: TrainingArguments
    folder: Path
    dtype: torch.dtype = torch.float32
    whole_batch: bool = False
    progress: bool = True

    def check(self, mode: Mode) -> None:
        """Raise the user's mistakes before anything is trained.

        Raises:
            ValueError: The batch cannot be split, rows are missing, the weights do not fit, or the reference lacks a
                setting.
        """
        loop_settings(self._arguments(mode))
        self._class_weights(self._task(mode))

    def run(self, mode: Mode, *, stock: bool = False) -> Iterator[Row]:
        """Train the reference, `CustomTrainer` and, where asked for, the stock `Trainer`; one row each."""
        task = self._task(mode)
        reference_mode = replace(mode, accumulation=1) if self.whole_batch else mode
        rounding = ROUNDING[self.dtype]
        candidates: dict[str, tuple[type[Trainer], Tolerance]] = {
            mode.name: (CustomTrainer, BITWISE if reference_mode == mode and not self.whole_batch else rounding)
        }
        if stock:
            candidates[f"stock:{mode.name}"] = (stock_trainer(self._class_weights(task)), rounding)
        reference = None
        for name, (trainer_class, tolerance) in candidates.items():
            row = Row(name, tolerance, dropout=not self.whole_batch)
            try:
                reference = reference or self._reference(reference_mode, task)
                candidate = self._candidate(mode, task, trainer_class)
            except Exception as error:
                yield replace(row, error=f"{type(error).__name__}: {error}")
                continue
            same_split = reference_mode.accumulation == mode.accumulation
            comparison = compare(reference, candidate, tolerance, same_split=same_split)
            yield replace(row, comparison=comparison, reference=reference, candidate=candidate)

    def _reference(self, mode: Mode, task: Task) -> Trajectory:
        model = self._model(task)
        recorder = Recorder("manual loop")
        recorder.begin(model, engine=type(model).__name__)
        result = run_manual_loop(task, self._arguments(mode), model, on_step=recorder.step, progress=self.progress)
        trajectory = recorder.end(model, result.optimizer, result.evaluations)
        trajectory.save(self.folder / mode.name / "manual")
        return trajectory

    def _candidate(self, mode: Mode, task: Task, trainer_class: type[Trainer]) -> Trajectory:
        trainer = build_trainer(task, self._arguments(mode), model=self._model(task), trainer_class=trainer_class)
        trainer.remove_callback(PrinterCallback)
        if self.progress:
            trainer.add_callback(StepBar(f"{mode.name}: {trainer_class.__name__}"))
        recorder = TrainerRecorder(trainer)
        trainer.train()
        trajectory = recorder.finish()
        trajectory.save(self.folder / mode.name / trainer_class.__name__)
        return trajectory

    def _model(self, task: Task) -> nn.Module:
        return task.new_model(self.args.seed, dtype=self.dtype, dropout=not self.whole_batch)

    def _task(self, mode: Mode) -> Task:
        return mode.rows(self.task, self.args.per_device_train_batch_size, self.args.max_steps)

    def _class_weights(self, task: Task) -> Tensor | None:
        return task.class_weights(getattr(self.args, "class_weights", None))

    def _arguments(self, mode: Mode) -> TrainingArguments:
        return replace(
            self.args,
            output_dir=str(self.folder / mode.name),
            per_device_train_batch_size=mode.micro_batch(self.args.per_device_train_batch_size),
            gradient_accumulation_steps=mode.accumulation,
            eval_strategy="no" if self.task.validation is None else "epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=self.args.device.type != "cpu",
            disable_tqdm=True,
        )


class StepBar(TrainerCallback):
    """One progress bar over the optimizer steps, and nothing else."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.label)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def stock_trainer(class_weights: Tensor | None) -> type[Trainer]:
    """The stock `Trainer`; with class weights, the override of `compute_loss` that tutorials show for it."""
    if class_weights is None:
        return Trainer

    class WeightedTrainer(Trainer):
        """As tutorials weight a loss: the mean of one micro-batch, and nothing said of accumulation."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            weight = cast(Tensor, class_weights).to(outputs.logits)
            loss = nn.CrossEntropyLoss(weight=weight)(outputs.logits.view(-1, len(weight)), labels.view(-1))
            return (loss, outputs) if return_outputs else loss

    return WeightedTrainer


def as_json(rows: list[Row]) -> dict[str, Any]:
    """What `parity.json` holds; a number that is not finite is written as text, as JSON has none."""
    return {"modes": [_row_as_json(row) for row in rows]}


def _row_as_json(row: Row) -> dict[str, Any]:
    found = row.comparison
    difference = found.first_difference if found else None
    return _finite(
        {
            "mode": row.mode,
            "verdict": row.verdict,
            "error": row.error,
            "steps": len(row.candidate.steps) if row.candidate else 0,
            "first_difference": asdict(difference) if difference else None,
            "max_abs_loss_difference": found.max_abs_loss_difference if found else None,
            "max_abs_weight_difference": found.max_abs_weight_difference if found else None,
            "loss_ratio": found.loss_ratio if found else None,
            "gradient_ratio": found.gradient_ratio if found else None,
            "tolerance": asdict(row.tolerance),
            "dropout": row.dropout,
            "evaluation": row.candidate.evaluations[-1] if row.candidate and row.candidate.evaluations else None,
            "runs_on": {
                "engine": row.candidate.engine if row.candidate else None,
                "world_size": row.candidate.world_size if row.candidate else None,
            },
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
