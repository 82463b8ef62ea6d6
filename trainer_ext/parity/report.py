"""The verdict for people: a table in the terminal, `report.html` and `report.md` to look at, `parity.json` for programs."""

import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer_ext.checkpoints.durable import write_durably
from trainer_ext.parity.curves import QUANTITIES, Line, figure
from trainer_ext.parity.differences import where
from trainer_ext.parity.environment import environment
from trainer_ext.parity.matrix import Row, as_json
from trainer_ext.parity.trajectory import Step, Trajectory
from trainer_ext.plain_text import for_markdown, for_pages, masked_words, printable

COLUMNS = ("mode", "verdict", "steps", "loss ratio", "gradient ratio", "max Δloss", "max Δweight", "held to")


def write(rows: list[Row], folder: Path, *, command: list[str], about: str = "") -> None:
    """Write `parity.json`, `report.html` and `report.md` into `folder`; `about` is a sentence below the verdict."""
    command = masked_words(command)
    document = {
        "verdict": verdict(rows),
        **as_json(rows),
        "environment": environment(),
        "command": shlex.join(command),
    }
    write_durably(folder / "parity.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    loader = PackageLoader("trainer_ext.parity")
    for name in ("report.html", "report.md"):
        html = name.endswith("html")
        templates = Environment(
            loader=loader, autoescape=html, undefined=StrictUndefined, trim_blocks=True, finalize=for_pages
        )
        templates.filters["plain"] = for_markdown
        page = templates.get_template(name).render(
            verdict=verdict(rows),
            agreed=all(row.verdict == "equal" for row in rows if row.counts),
            about=about,
            columns=COLUMNS,
            rows=[(row, cells(row, rows)) for row in rows],
            where=where,
            label=lambda row: label(row, rows),
            curves=[figure(quantity, lines(rows, quantity)) for quantity in QUANTITIES] if html else [],
            commands=[shlex.join(command), *(again(row) for row in rows if row.folders)],
            document=document,
        )
        write_durably(folder / name, page)


def show(rows: list[Row], folder: Path | None, *, about: str = "", console: Console | None = None) -> None:
    """Print the table, the first differences with their causes, and the verdict."""
    console = console or Console()
    table = Table(title="Held against the reference", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=place in (0, 1, 7))
    for row in rows:
        style = {"equal": "green", "differs": "red" if row.counts else "yellow", "failed": "red"}[row.verdict]
        table.add_row(*(Text(printable(cell)) for cell in cells(row, rows)), style=style)
    console.print(table)
    for row in rows:
        if text := explained(row):
            console.print(printable(f"{label(row, rows)}: {text}\n"), markup=False, highlight=False)
    if about:
        console.print(about, markup=False)
    console.print(printable(verdict(rows)), style="bold", markup=False)
    if folder is not None:
        console.print(f"Report: {folder / 'report.html'}", markup=False)


def verdict(rows: list[Row]) -> str:
    """One sentence for the whole matrix."""
    judged = [row for row in rows if row.counts]
    wrong = [f"{label(row, rows)} {row.verdict}" for row in judged if row.verdict != "equal"]
    if wrong:
        return f"Not the same run: {', '.join(wrong)}."
    exact = all(row.tolerance.bitwise for row in judged)
    held = ", ".join(dict.fromkeys(row.tolerance.name for row in judged if not row.tolerance.bitwise))
    how = "bitwise equal" if exact else f"equal within {held} rounding"
    dropout = "on" if all(row.dropout for row in judged) else "off where the split differs"
    paths = " and ".join(dict.fromkeys(path.path for row in judged for path in (row.reference, row.candidate) if path))
    modes = ", ".join(dict.fromkeys(row.mode for row in judged))
    return f"{paths[:1].upper()}{paths[1:]} are {how} in {modes} (dropout {dropout})."


def label(row: Row, rows: list[Row]) -> str:
    """The row's mode; with its dtype where the matrix was run in several."""
    return row.mode if len({other.dtype for other in rows}) == 1 else f"{row.mode} {row.dtype}"


def quality(rows: list[Row], validation: Dataset | None) -> str:
    """The last evaluation of the first mode beside what always answering the commonest class would get."""
    evaluated = next((row.candidate for row in rows if row.candidate and row.candidate.evaluations), None)
    if evaluated is None or validation is None:
        return "No validation split: nothing was evaluated."
    labels = Counter(validation["labels"])
    majority = max(labels.values()) / labels.total()
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.evaluations[-1].metrics.items())
    return f"Validation: {metrics}; always the commonest class: accuracy {majority:.4f}."


def cells(row: Row, rows: list[Row]) -> list[str]:
    """A row's texts, in the order of `COLUMNS`."""
    found, steps = row.comparison, len(row.candidate.steps) if row.candidate else 0
    if found is None:
        return [label(row, rows), row.verdict, "", "", "", "", "", row.tolerance.name]
    numbers = (found.loss_ratio, found.gradient_ratio)
    gaps = (found.max_abs_loss_difference, found.max_abs_weight_difference)
    ratios = ["" if math.isnan(number) else f"{number:.3f}" for number in numbers]
    return [label(row, rows), row.verdict, str(steps), *ratios, *(f"{gap:.2g}" for gap in gaps), row.tolerance.name]


def explained(row: Row) -> str:
    """Where a row first differs and why, or why it failed, with the end of its logs; empty where it is equal."""
    if row.comparison is None:
        return f"{row.error}\n{row.log}".rstrip()
    first = row.comparison.first_difference
    return "" if first is None else f"{where(first)}.\n{row.diagnosis}"


def again(row: Row) -> str:
    """The command that compares a row's records again."""
    assert row.folders is not None
    tolerance = "bitwise" if row.tolerance.bitwise else f"{row.tolerance.relative:g}"
    return shlex.join(["trainer-ext", "parity", "compare", *map(str, row.folders), "--tolerance", tolerance])


def lines(rows: list[Row], quantity: str) -> list[Line]:
    """What a figure draws of a quantity: a line a row."""
    found = []
    for row in rows:
        if row.candidate is not None and row.reference is not None:
            steps = [step.step for step in row.candidate.steps]
            found.append(
                Line(label(row, rows), steps, _of(row.candidate, quantity), _of(row.reference, quantity), row.counts)
            )
    return found


def _of(run: Trajectory, quantity: str) -> list[float | None]:
    def value(step: Step) -> Any:
        return max(step.learning_rates, default=None) if quantity == "learning_rate" else getattr(step, quantity)

    return [value(step) for step in run.steps]
