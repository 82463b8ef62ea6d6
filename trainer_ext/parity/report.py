"""The verdict for people: a table in the terminal, `parity.json` for programs, `report.html` to look at."""

import io
import json
import os
import platform
import shlex
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trainer_ext.parity.matrix import Matrix, Row, as_json

COLUMNS = ("mode", "verdict", "steps", "loss ratio", "gradient ratio", "max Δloss", "max Δweight", "held to")
CURVES = (("loss", "Loss of each step"), ("grad_norm", "Gradient norm before clipping"))


def write(rows: list[Row], matrix: Matrix, folder: Path, *, command: list[str]) -> None:
    """Write `parity.json` and `report.html` into `folder`."""
    document = {**as_json(rows), "environment": environment(), "command": shlex.join(command)}
    (folder / "parity.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    templates = Environment(loader=PackageLoader("trainer_ext.parity"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("report.html").render(
        verdict=verdict(rows),
        agreed=all(row.verdict == "equal" for row in rows if row.counts),
        quality=quality(rows, matrix),
        columns=COLUMNS,
        rows=[(row, cells(row), difference(row)) for row in rows],
        curves=[(title, Markup(curve(rows, quantity, title))) for quantity, title in CURVES],
        document=document,
    )
    (folder / "report.html").write_text(page)


def show(rows: list[Row], matrix: Matrix, folder: Path, console: Console | None = None) -> None:
    """Print the table, the differences and the verdict."""
    console = console or Console()
    table = Table(
        title="CustomTrainer and the stock Trainer, held against the manual loop",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for place, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=place in (0, 1, 7))
    for row in rows:
        style = {"equal": "green", "differs": "red" if row.counts else "yellow", "failed": "red"}[row.verdict]
        table.add_row(*cells(row), style=style)
    console.print(table)
    for row in rows:
        if text := difference(row):
            console.print(f"{row.mode}: {text}", markup=False, highlight=False)
    console.print(quality(rows, matrix), markup=False)
    console.print(verdict(rows), style="bold", markup=False)
    console.print(f"Report: {folder / 'report.html'}", markup=False)


def verdict(rows: list[Row]) -> str:
    """One sentence for the whole matrix."""
    judged = [row for row in rows if row.counts]
    wrong = [f"{row.mode} {row.verdict}" for row in judged if row.verdict != "equal"]
    if wrong:
        return f"CustomTrainer and the manual loop do not agree: {', '.join(wrong)}."
    exact = all(row.tolerance.bitwise for row in judged)
    how = "bitwise equal" if exact else f"equal within {judged[0].tolerance.name} rounding"
    dropout = "on" if judged[0].dropout else "off"
    return (
        f"CustomTrainer and the manual loop are {how} in {', '.join(row.mode for row in judged)} (dropout {dropout})."
    )


def quality(rows: list[Row], matrix: Matrix) -> str:
    """The last evaluation of the first mode beside what always answering the commonest class would get."""
    evaluated = next((row.candidate for row in rows if row.candidate and row.candidate.evaluations), None)
    if evaluated is None or matrix.task.validation is None:
        return "No validation split: nothing was evaluated."
    labels = Counter(matrix.task.validation["labels"])
    majority = max(labels.values()) / labels.total()
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.evaluations[-1].items())
    return f"Validation: {metrics}; always the commonest class: accuracy {majority:.4f}."


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of `COLUMNS`."""
    found, steps = row.comparison, len(row.candidate.steps) if row.candidate else 0
    if found is None:
        return [row.mode, row.verdict, "", "", "", "", "", row.tolerance.name]
    return [
        row.mode,
        row.verdict,
        str(steps),
        f"{found.loss_ratio:.3f}",
        f"{found.gradient_ratio:.3f}",
        f"{found.max_abs_loss_difference:.2g}",
        f"{found.max_abs_weight_difference:.2g}",
        row.tolerance.name,
    ]


def difference(row: Row) -> str:
    """Where a row first differs, or why it failed; empty where it is equal."""
    if row.comparison is None:
        return str(row.error)
    first = row.comparison.first_difference
    if first is None:
        return ""
    return f"first difference at step {first.step}, {first.quantity}: manual loop {first.reference}, here {first.candidate}"


def curve(rows: list[Row], quantity: str, title: str) -> str:
    """An SVG of one quantity over the steps: the reference of the first mode, and every row."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=title, yscale="log")
    drawn = [row for row in rows if row.candidate and row.reference]
    for row in drawn:
        assert row.candidate is not None
        values = [getattr(step, quantity) for step in row.candidate.steps]
        axes.plot(range(1, len(values) + 1), values, label=row.mode, linewidth=1, linestyle="-" if row.counts else ":")
    if drawn:
        axes.legend(fontsize="small")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Title": title})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}, by mode" ', 1)


def environment() -> dict[str, Any]:
    """What the numbers may depend on."""
    packages = ("trainer_ext", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
    }
