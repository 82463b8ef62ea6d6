"""A schedule before the run: its multipliers as a table and as a picture."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from trainer_ext.optim.multipliers import MULTIPLIERS, Run, multiplier
from trainer_ext.optim.schedules import check_schedule

SHOWN = 11  # rows of the table
FORMATS = (".svg", ".png", ".pdf")


def course(
    name: str, *, steps: int, warmup: float, learning_rate: float, options: dict[str, Any]
) -> tuple[Run, list[float]]:
    """The run, and the multiplier of each of its steps.

    Args:
        name: A schedule, not one that follows a metric.
        steps: Optimizer steps of the run.
        warmup: Steps of the climb; below 1 a share of the run, as `warmup_steps` of the training arguments.
        learning_rate: What options that are rates are a share of.
        options: The schedule's own.

    Raises:
        ValueError: With what is wrong about the name or the options.
    """
    if findings := check_schedule(name, options):
        raise ValueError("; ".join(findings))
    if name not in MULTIPLIERS:
        raise ValueError(f"{name} follows a metric, so that its course is not known before the run.")
    run = Run(int(warmup) if warmup >= 1 else math.ceil(steps * warmup), steps, learning_rate)
    at = multiplier(name, run, options)
    return run, [at(step) for step in range(steps)]


def read_options(words: list[str]) -> dict[str, Any]:
    """`key=value` words as options; a value is read as JSON where it is JSON."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--option {word}: write key=value, such as num_cycles=2.")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value
    return options


def show(run: Run, multipliers: list[float]) -> None:
    """A table of about ten steps, of which the first, the last and the end of the warmup are some."""
    last = len(multipliers) - 1
    steps = {round(i * last / (SHOWN - 1)) for i in range(SHOWN)} | {min(run.warmup_steps, last)}
    table = Table("step", "multiplier", "learning rate")
    for step in sorted(steps):
        table.add_row(str(step), f"{multipliers[step]:.6f}", f"{multipliers[step] * run.learning_rate:.4g}")
    Console().print(table)


def draw(path: Path, name: str, multipliers: list[float]) -> None:
    """The multipliers over the steps.

    Raises:
        ValueError: The file's ending is none of a picture, or there is no such folder.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot {path} must end in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}; make it, or name another.")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        drawn = Figure(figsize=(8, 3), layout="constrained")
        axes = drawn.subplots()
        axes.plot(range(len(multipliers)), multipliers, linewidth=1.2)
        axes.set(xlabel="optimizer step", ylabel="multiplier", title=name, ylim=(0, None))
        axes.grid(alpha=0.25)
        drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
