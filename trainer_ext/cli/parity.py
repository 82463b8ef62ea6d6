"""`trainer-ext parity`: run, calibrate, record, compare."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.cli.mistakes import users_mistakes
from trainer_ext.cli.options import (
    Accumulation,
    ClassWeights,
    Dataset,
    Epochs,
    GlobalBatch,
    LearningRate,
    MaxSteps,
    Model,
    OutputDir,
    Seed,
    argv_of,
)


def run(
    ctx: typer.Context,
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            help="With commas: [cyan]single[/], [cyan]gaN[/] (accumulation N), [cyan]ragged[/]; and in several processes "
            "[cyan]ddpN[/], [cyan]zero0[/] to [cyan]zero3[/], [cyan]zero2_offload[/], [cyan]fsdp2[/], "
            "[cyan]fsdp2_no_reshard[/] and other configs, with [cyan]_gaN[/] behind for accumulation.",
        ),
    ] = "single,ga4,ragged",
    processes: Annotated[int, typer.Option("--processes", help="Of a launched mode that names no number.", min=2)] = 2,
    include_stock: Annotated[
        bool, typer.Option("--include-stock", "--include_stock", help="Show the stock Trainer too, as stock:MODE.")
    ] = False,
    whole_batch: Annotated[
        bool,
        typer.Option(
            "--whole-batch",
            "--whole_batch",
            help="Let the reference take each step's rows as one micro-batch. Dropout is 0 then, and numbers are held to "
            "rounding instead of bits.",
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="[cyan]float32[/], [cyan]float64[/], or both with a comma.")
    ] = "float32",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Hold numbers to the noise that `parity calibrate` wrote there."),
    ] = None,
    dataset: Dataset = None,
    model: Model = None,
    output_dir: OutputDir = Path("parity_output"),
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: GlobalBatch = 16,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    class_weights: ClassWeights = None,
    seed: Seed = None,
) -> None:
    """Train the same thing by the manual loop and by CustomTrainer in every mode, and name the first difference."""
    with users_mistakes():
        argv = argv_of(ctx, without=("modes", "processes", "include_stock", "whole_batch", "dtype", "calibration"))
        from trainer_ext.output_folder import make_folder
        from trainer_ext.parity import runs

        asked = runs.Asked(modes, processes, include_stock, whole_batch, dtype, calibration)
        plan = runs.plan(asked, argv, output_dir)
        make_folder(output_dir, whole=True)
    if not runs.run(plan, output_dir, command=["trainer-ext", *sys.argv[1:]]):
        raise typer.Exit(1)


def calibrate(
    ctx: typer.Context,
    dtype: Annotated[str, typer.Option("--dtype", help="[cyan]float32[/] or [cyan]float64[/].")] = "float32",
    dataset: Dataset = None,
    model: Model = None,
    output_dir: OutputDir = Path("parity_output"),
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: GlobalBatch = 16,
    learning_rate: LearningRate = None,
    class_weights: ClassWeights = None,
    seed: Seed = None,
) -> None:
    """Measure the noise: rerun the manual loop with other threads, kernels and orders of summation.

    Writes calibration.json, which [cyan]parity run --calibration[/] takes.
    """
    with users_mistakes():
        argv = argv_of(ctx, without=("dtype",))
        from trainer_ext.output_folder import make_folder
        from trainer_ext.parity import runs

        plan = runs.plan(runs.Asked("single", whole_batch=True, dtype=dtype), argv, output_dir)
        if len(plan.matrices) > 1:
            raise ValueError(f"--dtype {dtype}: noise is measured in one, float32 or float64.")
        make_folder(output_dir, whole=True)
    runs.calibrate(plan, output_dir)


def record(
    ctx: typer.Context,
    output_dir: Annotated[
        Path, typer.Option("--output", "--output-dir", "--output_dir", help="The record's folder, a new one.")
    ],
    resumed: Annotated[
        bool, typer.Option("--resumed", help="The command resumes a recorded run: go on in its record.")
    ] = False,
) -> None:
    """Record a script's training without editing it: a Trainer of any kind, or a loop over accelerate.

    Put the command behind [cyan]--[/], as you would type it:

    [cyan]trainer-ext parity record --output runs/a -- torchrun --nproc_per_node 2 script.py --learning_rate 1e-4[/]

    The exit code is the script's own.
    """
    with users_mistakes():
        from trainer_ext.parity import recorded

        code = recorded.record(ctx.args, output_dir, resumed=resumed)
    raise typer.Exit(code)


def compare(
    a: Annotated[Path, typer.Argument(help="The reference's record.")],
    b: Annotated[Path, typer.Argument(help="The candidate's.")],
    tolerance: Annotated[
        str,
        typer.Option(
            "--tolerance",
            help="[cyan]bitwise[/], a number (relative), or a calibration.json.",
            show_default="that of the weights' dtype",
        ),
    ] = "",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--output_dir", help="Write report.html, report.md and parity.json here."),
    ] = None,
) -> None:
    """Compare two records, and name the first difference and its likely cause. Exit code 1 where they differ."""
    with users_mistakes():
        from trainer_ext.output_folder import output_folder
        from trainer_ext.parity import runs

        with output_folder(output_dir) if output_dir is not None else nullcontext():
            equal = runs.compare_records(a, b, tolerance, output_dir, command=["trainer-ext", *sys.argv[1:]])
    if not equal:
        raise typer.Exit(1)
