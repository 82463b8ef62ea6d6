"""Options that several commands share, and what of them goes on to the training arguments."""

from pathlib import Path
from typing import Annotated

import typer

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
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="[cyan]fast[/]: rows of like length together, bf16 where the hardware has it, the fused optimizer, the "
        "faster attention, cores divided among the ranks. Same rows an epoch, same steps. Switch one off by its own "
        "option, such as [cyan]--bf16 false[/] or [cyan]--train-sampling-strategy random[/]; docs/fast.md says what "
        "each does.",
    ),
]

# The short names of the command line, and the training arguments that they stand for.
ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
}


def argv_of(ctx: typer.Context, without: tuple[str, ...] = ()) -> list[str]:
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
