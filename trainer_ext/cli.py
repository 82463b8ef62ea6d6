"""The command `trainer-ext`: options in, one call of the library, a table out.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """The commands; a value that an option does not take is one message, too, with the value."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            found: list[Any] = getattr(error.__cause__, "errors", list)()
            given = f" It is {found[0]['input']!r}." if found else ""
            end_with(f"{error.format_message().rstrip('.')}.{given}")


app = typer.Typer(
    name="trainer-ext",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune with the Hugging Face Trainer, and prove that the arithmetic is right.",
    epilog="Exit codes: 0 done; 1 the answer is no (a mode differs or failed); 2 a mistake in what was asked for; 85 "
    "stopped by a signal or the time limit, with a checkpoint to resume from.",
)
parity_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Hold training paths against the plain PyTorch loop."
)
app.add_typer(parity_app, name="parity")

OTHERS = "Every other field of TrainingArguments is an option too, such as [cyan]--weight-decay 0.01[/]."
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="[cyan]sample[/] (built in, offline), a hub name such as glue/mrpc, a file (.jsonl .json .csv .tsv .parquet), "
        "or a folder with train.* and validation.*.",
        show_default="glue/mrpc; the sample when no hub can be reached",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A hub name, a checkpoint folder, or [cyan]tiny[/] (a small untrained BERT, offline).",
        show_default="tiny on the sample, else bert-base-uncased",
    ),
]
OutputDir = Annotated[Path, typer.Option("--output-dir", "--output_dir", help="Where everything is written.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Rows of a micro-batch.",
        min=1,
    ),
]
GlobalBatch = Annotated[
    int, typer.Option("--batch-size", help="Rows of one optimizer step; each mode splits them.", min=1)
]
Accumulation = Annotated[
    int | None,
    typer.Option(
        "--accumulation",
        help="Micro-batches of an optimizer step.",
        min=1,
    ),
]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="The highest learning rate.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps, whatever the epochs say.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of weights, data order and dropout.")]
Loss = Annotated[
    str | None, typer.Option("--loss", help="A name, [cyan]model[/] (the head's own), or an import path.")
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        "--class-weights",
        help="[cyan]balanced[/], a JSON list ('\\[1, 2.5]') or a JSON object ('{\"1\": 2.5}').",
    ),
]

# The short names of the command line, and the training arguments that they stand for.
ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
}


@app.command(context_settings=PASS_ON, epilog=OTHERS)
def train(
    ctx: typer.Context,
    dataset: Dataset = None,
    model: Model = None,
    output_dir: OutputDir = Path("trainer_output"),
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
            argv = _argv(ctx)
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


@app.command(context_settings=PASS_ON, epilog=OTHERS)
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
        argv = _argv(ctx)
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


@parity_app.command("run", context_settings=PASS_ON, epilog=OTHERS)
def parity_run(
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
        argv = _argv(ctx, without=("modes", "processes", "include_stock", "whole_batch", "dtype", "calibration"))
        from trainer_ext.output_folder import make_folder
        from trainer_ext.parity import runs

        asked = runs.Asked(modes, processes, include_stock, whole_batch, dtype, calibration)
        plan = runs.plan(asked, argv, output_dir)
        make_folder(output_dir, whole=True)
    if not runs.run(plan, output_dir, command=["trainer-ext", *sys.argv[1:]]):
        raise typer.Exit(1)


@parity_app.command("calibrate", context_settings=PASS_ON, epilog=OTHERS)
def parity_calibrate(
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
        argv = _argv(ctx, without=("dtype",))
        from trainer_ext.output_folder import make_folder
        from trainer_ext.parity import runs

        plan = runs.plan(runs.Asked("single", whole_batch=True, dtype=dtype), argv, output_dir)
        if len(plan.matrices) > 1:
            raise ValueError(f"--dtype {dtype}: noise is measured in one, float32 or float64.")
        make_folder(output_dir, whole=True)
    runs.calibrate(plan, output_dir)


@parity_app.command("record", context_settings=PASS_ON)
def parity_record(
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


@parity_app.command("compare")
def parity_compare(
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


@app.command(context_settings=PASS_ON)
def rehearse(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option("--processes", help="CPU processes, in the place of GPUs.", min=1)] = 2,
    steps: Annotated[
        int,
        typer.Option("--steps", help="Optimizer steps; the last is taken again after a resume.", min=2),
    ] = 2,
    resume: Annotated[bool, typer.Option(help="Resume from the checkpoint in new processes.")] = True,
    keep_hosts: Annotated[
        bool,
        typer.Option(
            "--keep-hosts",
            help="This host's part of a launch on several hosts.",
        ),
    ] = False,
    log: Annotated[Path | None, typer.Option("--log", help="Keep what the processes print.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the verdict as JSON here too.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each of the two runs.", min=1)] = 1800,
) -> None:
    """Run a GPU launch on CPU processes with the real engine, and verify what really ran.

    Put the command behind [cyan]--[/], as for GPUs:

    [cyan]trainer-ext rehearse -- accelerate launch --config_file fsdp_configs/fsdp2.yaml script.py --output_dir runs/a[/]

    It takes a few steps, saves, resumes and exports the weights into the command's output_dir, where it leaves
    rehearsal.json too. Exit code 1 where the launch fell back, trained nothing or broke.
    """
    with users_mistakes():
        from trainer_ext.rehearsal.report import show
        from trainer_ext.rehearsal.run import rehearse as run_rehearsal

        found = run_rehearsal(
            ctx.args,
            processes=processes,
            steps=steps,
            resume=resume,
            keep_hosts=keep_hosts,
            timeout=timeout,
            log=log,
            progress=True,
        )
        if report is not None:
            report.write_text(json.dumps(found.as_json(), indent=1))
    show(found)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def groups(
    model: Annotated[
        str, typer.Argument(help="A hub name, a checkpoint folder, the path of a config.json, or [cyan]tiny[/].")
    ],
    model_class: Annotated[
        str | None,
        typer.Option(
            "--model-class",
            "--model_class",
            help="A class of transformers, such as [cyan]AutoModelForSequenceClassification[/].",
            show_default="the one that the configuration names",
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", "--weight_decay", help="Of matrices.", min=0)
    ] = 0.01,
    layerwise_lr_decay: Annotated[
        float,
        typer.Option(
            "--layerwise-lr-decay", "--layerwise_lr_decay", help="The factor from each layer to the one below."
        ),
    ] = 1.0,
    head_lr_multiplier: Annotated[
        float, typer.Option("--head-lr-multiplier", "--head_lr_multiplier", help="Of the head's learning rate.")
    ] = 1.0,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            "--freeze", help="[cyan]embeddings[/], [cyan]layers:N[/] or a pattern for names; may be given again."
        ),
    ] = None,
    rules: Annotated[
        str | None, typer.Option("--rules", help="As --param-group-rules: a JSON list, or a file with one.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every parameter.")] = False,
) -> None:
    """Print the parameter groups that a training would have, without weights: learning rates, decay, what is frozen."""
    with users_mistakes():
        from trainer_ext.group_table import show_groups

        show_groups(
            model,
            model_class=model_class,
            weight_decay=weight_decay,
            layerwise_lr_decay=layerwise_lr_decay,
            head_lr_multiplier=head_lr_multiplier,
            patterns=freeze or (),
            rules=rules,
            every=every,
        )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder checkpoint-N, of any engine.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: new, empty, or an earlier export.")],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", "--max_shard_size", help="Of a file, such as 200MB; bounds the memory.")
    ] = "5GB",
    averages: Annotated[
        bool, typer.Option("--averages", help="The averages of EMACallback in the place of the weights.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A folder with config.json and tokenizer, where the checkpoint has none."),
    ] = None,
) -> None:
    """Turn a checkpoint (plain, DDP, ZeRO, FSDP) into a folder for from_pretrained, and verify it by loading."""
    with users_mistakes():
        from trainer_ext.checkpoints.export import export as run_export

        found = run_export(checkpoint, out, max_shard_size=max_shard_size, averages=averages, described_by=model)
    typer.echo(f"{found.tensors} tensors ({found.source}), equal after loading: {found.folder}")


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="A value of lr_scheduler_type, such as one_cycle.")],
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps of the run.", min=1)] = 1000,
    warmup: Annotated[float, typer.Option("--warmup", help="Steps of the climb, or a share below 1.", min=0)] = 0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="What it multiplies.", min=0)] = 5e-5,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="One of lr_scheduler_kwargs as key=value; again for more.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it here (.svg, .png, .pdf).")] = None,
) -> None:
    """Show the course of a learning rate before the run."""
    with users_mistakes():
        from trainer_ext.optim import preview

        options = preview.read_options(option or [])
        run, multipliers = preview.course(
            name, steps=steps, warmup=warmup, learning_rate=learning_rate, options=options
        )
        if plot is not None:
            preview.draw(plot, name, multipliers)
    preview.show(run, multipliers)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or the output folder of a run.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Take this one checkpoint as it is now: write its manifest anew.")
    ] = False,
) -> None:
    """Hold checkpoints against what was saved: every file that is missing, added or changed is named."""
    with users_mistakes():
        from trainer_ext.checkpoints import resume
        from trainer_ext.checkpoints.manifest import write_manifest
        from trainer_ext.plain_text import printable

        found = resume.verdicts(folder)
        if accept:
            if list(found) != [folder]:
                raise ValueError(f"--accept is for one checkpoint, and {folder} has {len(found)}: name it.")
            write_manifest(folder)
    for path, wrong in found.items():
        typer.echo(
            f"{printable(str(path))}: {'as it was saved' if not wrong else 'accepted as it is' if accept else 'wrong'}"
        )
        for finding in wrong:
            typer.echo(f"  {finding}")
    if any(found.values()) and not accept:
        raise typer.Exit(1)


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(help="A file's name without its ending, such as zero2.")] = None,
) -> None:
    """List the DeepSpeed and FSDP configs that come with the package, or print the path of one."""
    from trainer_ext.configs.catalog import config_path, list_configs

    with users_mistakes():
        for path in [config_path(name)] if name else list_configs():
            typer.echo(path)


def main() -> None:
    """The entry point."""
    app()


@contextmanager
def users_mistakes(
    kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError, ImportError, RuntimeError),
) -> Iterator[None]:
    """Turn an error about what was asked for into one message and exit code 2."""
    try:
        yield
    except kinds as error:
        end_with(str(error))


def end_with(message: str) -> NoReturn:
    """Say what is wrong, on one line and without what a terminal would act on, and end with exit code 2."""
    from trainer_ext.plain_text import masked, printable

    typer.echo(f"trainer-ext: error: {printable(masked(' '.join(message.split())))}", err=True)
    raise typer.Exit(2) from None


def _argv(ctx: typer.Context, without: tuple[str, ...] = ()) -> list[str]:
    """The options that were given, as training arguments, and all others as they came.

    Raises:
        ValueError: One is given twice, by its short name here and by its long one.
    """
    others = {word.split("=")[0].lstrip("-").replace("-", "_"): word for word in ctx.args if word.startswith("--")}
    words = []
    for name, value in ctx.params.items():
        field = ALIASES.get(name, name)
        if value is None or name in without:
            continue
        if field in others or name in others:
            if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
                raise ValueError(f"--{name.replace('_', '-')} and {others.get(field) or others[name]} are both given.")
            continue
        words += [f"--{field}", str(value)]
    return words + ctx.args


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
