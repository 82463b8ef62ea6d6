"""`trainer-ext train` and `manual`: fine-tune, by the trainer or by the plain loop."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from trainer_ext.cli.mistakes import users_mistakes
from trainer_ext.cli.options import (
    Accumulation,
    BatchSize,
    ClassWeights,
    Dataset,
    Epochs,
    LearningRate,
    Loss,
    MaxSteps,
    Model,
    OutputDir,
    Profile,
    Seed,
    argv_of,
)


def train(
    ctx: typer.Context,
    dataset: Dataset = None,
    model: Model = None,
    output_dir: OutputDir = Path("trainer_output"),
    profile: Profile = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    loss: Loss = None,
    class_weights: ClassWeights = None,
    seed: Seed = None,
) -> None:
    """Fine-tune a text classifier with CustomTrainer, evaluate it, and save it."""
    with ExitStack() as folders:
        with users_mistakes():
            argv = argv_of(ctx)
            from trainer_ext import finetune
            from trainer_ext.callbacks.non_finite_guard import NonFiniteError
            from trainer_ext.checkpoints.resume import BadCheckpointError
            from trainer_ext.checkpoints.write import CheckpointNotSavedError
            from trainer_ext.output_folder import output_folder
            from trainer_ext.task import TaskParser, prepare_task

            task_arguments, args = TaskParser(prog="trainer-ext train").parse(argv)
            finetune.resume_asked(args)
            task = prepare_task(task_arguments)
            finetune.check_best_metric(args, task.label_names)
            folders.enter_context(output_folder(output_dir))
            trainer = finetune.build_trainer(task, args, metrics="all")
        if trainer.is_world_process_zero():
            finetune.show_class_weights(trainer)
        ended = (BadCheckpointError, CheckpointNotSavedError, NonFiniteError, finetune.NothingTrainedError)
        with users_mistakes(ended):
            metrics = finetune.train(trainer)
    _print_metrics(metrics, output_dir)


def manual(
    ctx: typer.Context,
    dataset: Dataset = None,
    model: Model = None,
    output_dir: OutputDir = Path("manual_output"),
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    class_weights: ClassWeights = None,
    seed: Seed = None,
) -> None:
    """Fine-tune with the plain PyTorch loop, the reference that CustomTrainer must equal."""
    with users_mistakes():
        argv = argv_of(ctx)
        from trainer_ext import finetune
        from trainer_ext.loop_settings import loop_settings
        from trainer_ext.output_folder import make_folder
        from trainer_ext.task import TaskParser, prepare_task

        task_arguments, args = TaskParser(prog="trainer-ext manual").parse(argv)
        loop_settings(args)
        task = prepare_task(task_arguments)
        task.class_weights(args.class_weights)
        fresh = task.new_model(args.seed)
        make_folder(output_dir)
    _print_metrics(finetune.train_manually(task, args, fresh), output_dir)


def _print_metrics(metrics: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainer_ext.plain_text import printable

    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(Text(printable(name)), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    typer.echo(f"Model and metrics: {folder}")
