"""Train every mode by the reference and by a `Trainer`, and hold the two against each other."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trainer_ext.finetune import build_trainer, run_manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.parity.candidate import launch_candidate
from trainer_ext.parity.causes import Diagnosis, diagnose
from trainer_ext.parity.comparison import Comparison, compare
from trainer_ext.parity.environment import about_dataset
from trainer_ext.parity.modes import Mode
from trainer_ext.parity.recorder import Recorder
from trainer_ext.parity.recording import TrainerRecorder
from trainer_ext.parity.tolerance import BITWISE, ROUNDING, Tolerance
from trainer_ext.parity.trajectory import Trajectory
from trainer_ext.task import Task
from trainer_ext.trainer import CustomTrainer


@dataclass(frozen=True)
class Row:
    """One line of the matrix: a mode's run by one trainer, held against the reference.

    Attributes:
        mode: The mode's name; `stock:NAME` for the stock `Trainer`.
        dtype: Of the weights.
        dropout: Whether dropout was on.
        error: Why there is no comparison, or None.
        log: The end of the failed processes' logs.
        folders: The records, of the reference and of the candidate.
        diagnosis: The likely cause of the first difference.
    """

    mode: str
    dtype: str
    tolerance: Tolerance
    dropout: bool
    error: str | None = None
    log: str = ""
    folders: tuple[Path, Path] | None = None
    comparison: Comparison | None = None
    diagnosis: Diagnosis | None = None
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
        argv: The words that `task` and `args` were parsed from; a mode of several processes is launched with them.
        rounding: What numbers are held to where only the order of summation differs; by default that of the dtype.
        on_step: Called with each step that a run has taken, for progress.
        references: The reference's runs and records, by split, since several modes are held against one.
    """

    task: Task
    args: TrainingArguments
    folder: Path
    dtype: torch.dtype = torch.float32
    whole_batch: bool = False
    argv: list[str] | None = None
    rounding: Tolerance | None = None
    on_step: Callable[[], None] = lambda: None
    references: dict[tuple[Any, ...], tuple[Path, Trajectory]] = field(default_factory=dict, repr=False)

    def check(self, mode: Mode) -> None:
        """Raise the user's mistakes before anything is trained.

        Raises:
            ValueError: The batch cannot be split, rows are missing, the weights do not fit, or the reference lacks a
                setting.
        """
        loop_settings(self._arguments(mode))
        self._class_weights(self._task(mode))
        if mode.ranks > 1 and self.argv is None:
            raise ValueError(
                f"mode {mode.name!r} starts processes, which need the words of the command: Matrix(argv=...)."
            )
        if mode.deepspeed is not None and self.dtype != torch.float32:
            raise ValueError(
                f"mode {mode.name!r} cannot be held in {str(self.dtype).removeprefix('torch.')}: ZeRO keeps float32 "
                "masters. DDP and FSDP2 can."
            )

    def runs(self, mode: Mode, *, stock: bool = False) -> list[tuple[str, int]]:
        """The runs that `run` will make, with the optimizer steps of each; references of other modes are among them."""
        task = self._task(mode)
        steps = loop_settings(self._arguments(mode)).total_steps(len(task.train))
        names = ["manual loop", "CustomTrainer", *(["stock Trainer"] if stock else [])]
        return [(f"{mode.name}: {name}", steps) for name in names]

    def run(self, mode: Mode, *, stock: bool = False) -> Iterator[Row]:
        """Train the reference, `CustomTrainer` and, where asked for, the stock `Trainer`; one row each."""
        task = self._task(mode)
        whole_batch = self.whole_batch or mode.ranks > 1
        reference_mode = replace(mode, accumulation=1, ranks=1, config=None) if whole_batch else mode
        dtype = str(self.dtype).removeprefix("torch.")
        rounding = self.rounding or ROUNDING[dtype]
        candidates = {mode.name: BITWISE if not whole_batch else rounding}
        candidates |= {f"stock:{mode.name}": rounding} if stock else {}
        for name, tolerance in candidates.items():
            row = Row(name, dtype, tolerance, dropout=not whole_batch)
            folder = self.folder / mode.name / ("CustomTrainer" if name == mode.name else "stock")
            try:
                home, reference = self._reference(reference_mode, task, dropout=not whole_batch)
                candidate = self._candidate(mode, task, folder, stock=name != mode.name)
            except Exception as error:
                yield replace(row, error=f"{type(error).__name__}: {error}", log=tail(folder))
                continue
            same_split = reference_mode.accumulation == mode.accumulation and mode.ranks == 1
            comparison = compare(reference, candidate, tolerance, same_split=same_split)
            first = comparison.first_difference
            yield replace(
                row,
                comparison=comparison,
                diagnosis=diagnose(reference, candidate, first) if first else None,
                folders=(home, folder),
                reference=reference,
                candidate=candidate,
            )

    def _reference(self, mode: Mode, task: Task, *, dropout: bool) -> tuple[Path, Trajectory]:
        key = (mode.accumulation, mode.ragged, dropout, len(task.train))
        if key not in self.references:
            folder = self.folder / mode.name / "manual"
            self.references[key] = folder, self.reference_run(mode, task, dropout=dropout, folder=folder)
        return self.references[key]

    def reference_run(
        self, mode: Mode, task: Task, *, dropout: bool, folder: Path | None = None, **changes: Any
    ) -> Trajectory:
        """One run of the manual loop, recorded; `changes` are of the training arguments."""
        args = replace(self._arguments(mode), **changes)
        model = self._model(task, dropout)
        about = {"seeds": {"seed": args.seed, "data_seed": None}, "arguments": json.loads(args.to_json_string())}
        data = {"train": about_dataset(task.train), "evaluation": about_dataset(task.validation)}
        recorder = Recorder("manual loop", folder, {**about, "dataset": data})
        recorder.begin(model)
        recorder.watch()

        def on_step(**step: Any) -> None:
            recorder.step(**step)
            self.on_step()

        result = run_manual_loop(task, args, model, on_step=on_step, on_evaluate=recorder.evaluation, progress=False)
        recorder.end(result.optimizer)
        return recorder.trajectory()

    def _candidate(self, mode: Mode, task: Task, folder: Path, *, stock: bool) -> Trajectory:
        if mode.ranks > 1:
            words = [*(self.argv or []), *self._words(mode)]
            launch_candidate(mode, words, folder, stock=stock, dtype=self.dtype, on_step=self.on_step)
            return Trajectory.load(folder)
        trainer_class = stock_trainer(self._class_weights(task)) if stock else CustomTrainer
        model = self._model(task, dropout=not self.whole_batch)
        trainer = build_trainer(task, self._arguments(mode), model=model, trainer_class=trainer_class)
        trainer.add_callback(OnStep(self.on_step))
        return record(trainer, folder)

    def _words(self, mode: Mode) -> list[str]:
        """What a mode changes in the arguments, as words behind those of the command."""
        changed = self._changes(mode) | ({"deepspeed": mode.deepspeed} if mode.deepspeed else {})
        return [word for name, value in changed.items() for word in (f"--{name}", str(value))]

    def _model(self, task: Task, dropout: bool) -> nn.Module:
        return task.new_model(self.args.seed, dtype=self.dtype, dropout=dropout)

    def _task(self, mode: Mode) -> Task:
        return mode.rows(self.task, self.args.per_device_train_batch_size, self.args.max_steps)

    def _class_weights(self, task: Task) -> Tensor | None:
        return task.class_weights(getattr(self.args, "class_weights", None))

    def _arguments(self, mode: Mode) -> TrainingArguments:
        return replace(self.args, **self._changes(mode))

    def _changes(self, mode: Mode) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / mode.name),
            "per_device_train_batch_size": mode.micro_batch(self.args.per_device_train_batch_size),
            "gradient_accumulation_steps": mode.accumulation,
            "eval_strategy": "no" if self.task.validation is None else "epoch",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": self.args.device.type != "cpu",
            "disable_tqdm": True,
        }


def record(trainer: Trainer, folder: Path) -> Trajectory:
    """Train in silence, and return what happened."""
    trainer.remove_callback(PrinterCallback)
    recorder = TrainerRecorder(trainer, folder)
    trainer.train()
    return recorder.finish()


def tail(folder: Path, lines: int = 15) -> str:
    """The last lines of each process's log in a candidate's folder."""
    logs = {path.name: path.read_text(errors="replace").strip().splitlines() for path in sorted(folder.glob("*.log"))}
    return "\n".join(f"{name}: {line}" for name, said in logs.items() for line in said[-lines:])


class OnStep(TrainerCallback):
    """Says that a step was taken, and nothing else."""

    def __init__(self, said: Callable[[], None]) -> None:
        self.said = said

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said()


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
            "dtype": row.dtype,
            "verdict": row.verdict,
            "error": row.error,
            "log": row.log,
            "steps": len(row.candidate.steps) if row.candidate else 0,
            "first_difference": asdict(difference) if difference else None,
            "diagnosis": asdict(row.diagnosis) if row.diagnosis else None,
            "records": [str(folder) for folder in row.folders] if row.folders else None,
            "max_abs_loss_difference": found.max_abs_loss_difference if found else None,
            "max_abs_weight_difference": found.max_abs_weight_difference if found else None,
            "loss_ratio": found.loss_ratio if found else None,
            "gradient_ratio": found.gradient_ratio if found else None,
            "tolerance": asdict(row.tolerance),
            "dropout": row.dropout,
            "evaluation": row.candidate.evaluations[-1].metrics
            if row.candidate and row.candidate.evaluations
            else None,
            "noise": {
                "loss": found.max_relative_loss_difference if found else None,
                "grad_norm": found.max_relative_gradient_difference if found else None,
            },
            "runs_on": row.candidate.runs_on if row.candidate else None,
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
