"""`trainer-ext groups` and `schedule`: what a run's optimizer would be, before it runs."""

from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.cli.mistakes import users_mistakes


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
