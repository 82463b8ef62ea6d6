"""Fine-tune a task from start to saved model: through `CustomTrainer`, or through the manual loop."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from trainer_ext import manual_loop
from trainer_ext.callbacks.stop_on_signal import EXIT_CODE
from trainer_ext.checkpoints.durable import write_durably
from trainer_ext.checkpoints.manifest import MANIFEST
from trainer_ext.checkpoints.resume import checkpoints_in, named, newest_good
from trainer_ext.checkpoints.trainer import SafeCheckpointsMixin, ranks_of
from trainer_ext.loop_settings import loop_settings
from trainer_ext.loss_record import check_same_loss, weights_table
from trainer_ext.metrics import DEFAULT_METRICS, AccuracyAndF1, ComputeMetrics, compute_metrics
from trainer_ext.metrics.pictures import save_pictures
from trainer_ext.metrics.table import metric_keys
from trainer_ext.task import Task
from trainer_ext.trainer import CustomTrainer


class NothingTrainedError(ValueError):
    """Training ended before its first step: what was asked for does not fit together."""


def build_trainer(
    task: Task,
    args: TrainingArguments,
    *,
    model: Any = None,
    trainer_class: type[Trainer] = CustomTrainer,
    metrics: str | Sequence[str] = DEFAULT_METRICS,
) -> Trainer:
    """A trainer on `task`, its labels and weights checked.

    Args:
        task: The data and the model.
        args: For the trainer.
        model: What to train; by default the task's model, from `args.seed`.
        trainer_class: `CustomTrainer`, or what is held against it.
        metrics: Of each evaluation, as `trainer_ext.metrics.compute_metrics` takes them.

    Raises:
        ValueError: The arguments do not fit the task, or the checkpoint to resume was trained with another loss.
    """
    if args.dataloader_drop_last and len(task.train) < args.train_batch_size:
        raise ValueError(
            f"{len(task.train)} training rows are less than one batch of {args.train_batch_size}, and "
            "dataloader_drop_last=True drops what is left of a batch: nothing would be trained."
        )
    trainer = trainer_class(
        model=task.new_model(args.seed) if model is None else model,
        args=args,
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        compute_metrics=compute_metrics(len(task.label_names), metrics, task.label_names, keep_rows=True),
    )
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is not None and isinstance(trainer, CustomTrainer):
        check_same_loss(checkpoint, trainer.configured_loss)
    return trainer


def train(trainer: Trainer) -> dict[str, Any]:
    """Train, evaluate once where there is a validation split, and save the model, the metrics and their pictures.

    Returns:
        The metrics of training and evaluation.

    Raises:
        SystemExit: With code 85, where a signal or the time limit ended the training: a checkpoint is saved, and nothing is
            evaluated or written as if it had come to its end.
        NothingTrainedError: In the words of the error that came before the first step.
        BadCheckpointError: A checkpoint is not as it was saved.
    """
    safe = isinstance(trainer, SafeCheckpointsMixin)
    checkpoint = resume_asked(trainer.args) if safe else checkpoint_to_resume(trainer.args)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except ValueError as error:
        if trainer.state.global_step:
            raise
        raise NothingTrainedError(str(error)) from error
    if getattr(trainer, "stopped_by", None):
        raise SystemExit(EXIT_CODE)
    trainer.save_metrics("train", metrics)
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.save_metrics("eval", evaluation)
        compute = trainer.compute_metrics
        if isinstance(compute, ComputeMetrics) and compute.last is not None and trainer.is_world_process_zero():
            save_pictures(compute.last, compute.label_names, Path(str(trainer.args.output_dir)))
        metrics = {**metrics, **evaluation}
    return metrics


def show_class_weights(trainer: Trainer) -> None:
    """Print the classes with their counts and weights, where the loss has weights."""
    loss = trainer.configured_loss if isinstance(trainer, CustomTrainer) else None
    if loss is not None and loss.class_weights is not None:
        print(weights_table(loss, trainer.model))


def run_manual_loop(
    task: Task,
    args: TrainingArguments,
    model: nn.Module,
    *,
    on_step: Callable[..., None] | None = None,
    on_evaluate: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> manual_loop.LoopResult:
    """Train `model` on `task` by the manual loop; `on_step` and `on_evaluate` as `manual_loop.train` takes them."""
    return manual_loop.train(
        model,
        task.train,
        task.collator,
        loop_settings(args),
        eval_dataset=task.validation,
        metric=AccuracyAndF1(len(task.label_names)),
        class_weights=task.class_weights(getattr(args, "class_weights", None)),
        on_step=on_step,
        on_evaluate=on_evaluate,
        progress=progress,
    )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `resume_from_checkpoint` means, verified; `true` is the newest good one.

    Raises:
        ValueError: There is no such checkpoint, or it is not as it was saved.
    """
    asked = resume_asked(args)
    if asked is None:
        return None
    ranks = ranks_of(args)
    choice = newest_good(Path(str(args.output_dir)), ranks) if asked is True else named(Path(str(asked)), ranks)
    assert choice is not None
    return str(choice.folder)


def resume_asked(args: TrainingArguments) -> str | bool | None:
    """What `resume_from_checkpoint` asks for, as `Trainer.train` takes it: a folder, True for the newest, or None.

    Raises:
        ValueError: There is no such checkpoint.
    """
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() == "true":
        if not checkpoints_in(Path(str(args.output_dir))):
            raise ValueError(f"resume_from_checkpoint=true: there is no checkpoint in {args.output_dir}.")
        return True
    if not any((Path(asked) / name).is_file() for name in (MANIFEST, "trainer_state.json")):
        raise ValueError(
            f"resume_from_checkpoint={asked}: that is no checkpoint folder (it has no trainer_state.json)."
        )
    return str(asked)


def check_best_metric(args: TrainingArguments, label_names: Sequence[str]) -> None:
    """Raise where the best checkpoint is to be found by a metric that the evaluation does not give, or the wrong way."""
    if args.metric_for_best_model is None:
        return
    given = ["loss", *metric_keys("all", label_names)]
    asked = args.metric_for_best_model.removeprefix("eval_")
    if asked not in given:
        raise ValueError(f"metric_for_best_model={args.metric_for_best_model}: choose one of {', '.join(given)}.")
    if asked == "calibration_error" and args.greater_is_better:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model} with greater_is_better=True, which transformers takes for "
            "granted, keeps the worst checkpoint. Give --greater-is-better false."
        )


def train_manually(task: Task, args: TrainingArguments, model: nn.Module) -> dict[str, float]:
    """The same by the manual loop; `model` and `eval_results.json` go to `args.output_dir`.

    Returns:
        The last evaluation, empty without a validation split.
    """
    result = run_manual_loop(task, args, model, progress=not args.disable_tqdm)
    folder = Path(str(args.output_dir))
    model.save_pretrained(folder)  # type: ignore[operator]
    task.tokenizer.save_pretrained(folder)
    evaluation = result.evaluations[-1] if result.evaluations else {}
    metrics = {f"eval_{name}": value for name, value in evaluation.items()}
    write_durably(folder / "eval_results.json", json.dumps(metrics, indent=4, sort_keys=True))
    return metrics
