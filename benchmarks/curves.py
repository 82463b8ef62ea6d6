"""The curves of `scaling.json` in Markdown: at each point a step's time and memory, ours and the stock one's; growth."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from pairs import AGAIN, CONTROL
from plots import growing, save

STOCK, OURS = "Trainer", "CustomTrainer"
X = {  # by curve: the field of a point, and what it is called
    "parameters": ("parameters", "parameters"),
    "length": ("length", "tokens a row"),
    "batch": ("batch", "rows a batch"),
    "ranks": ("ranks", "ranks (DDP over gloo, on the same cores)"),
    "rows streamed": ("rows", "rows of a streamed dataset"),
    "rows shuffled": ("rows", "rows of a shuffled dataset on disk"),
}
Points = list[dict[str, Any]]


def curve_page(curve: str, measured: dict[str, Any], by: str, docs: Path) -> Iterator[str]:
    """A curve as a plot, a table and its growth."""
    points, (field, label) = measured["points"], X[curve]
    xs, name = [point[field] for point in points], f"scaling_{curve.replace(' ', '_')}"
    kinds = ("first step", "step", "memory") if curve.startswith("rows") else ("step", "memory")
    panels = {f"{kind} ({'MB' if kind == 'memory' else 'ms'})": series(points, kind) for kind in kinds}
    save(docs, name, f"Time and memory over {label}", lambda drawn: growing(drawn, label, xs, panels))
    yield f"### Over {label}\n"
    said = "; ".join(filter(None, (fixed(points, field), shown(measured["environment"]))))
    yield f"Measured on {measured['date']} by {by}: {said}.\n"
    yield f"![Time and memory over {label}](performance/{name}.svg)\n"
    yield "\n".join(table(label, xs, points, panels))
    yield growth(xs, panels)


def series(points: Points, kind: str) -> dict[str, list[float]]:
    """Of each arm: milliseconds of wall time, or megabytes."""
    part, key, unit = {
        "first step": ("first", "wall", 1e3),
        "step": ("step", "wall", 1e3),
        "memory": ("step", "bytes", 1e-6),
    }[kind]
    return {arm: [unit * point[part]["seconds"][arm][key]["median"] for point in points] for arm in (STOCK, OURS)}


def table(label: str, xs: Sequence[int], points: Points, panels: dict[str, Any]) -> Iterator[str]:
    heads = [f"{quantity}: {arm}" for quantity, arms in panels.items() for arm in arms]
    yield f"| {label} | {' | '.join(heads)} | ratio of steps (CPU) | control | ratio of memory |"
    yield "|---" * (len(heads) + 4) + "|"
    for number, (x, point) in enumerate(zip(xs, points, strict=True)):
        ratios = point["step"]["ratios"]
        control = ratios[STOCK + AGAIN]["cpu"]["median"]
        mark = "" if abs(control - 1) <= CONTROL else " †"
        cells = [f"{values[number]:,.4g}" for arms in panels.values() for values in arms.values()]
        cells += [
            f"{ratios[OURS]['cpu']['median']:.3f}{mark}",
            f"{control:.3f}",
            f"{ratios[OURS]['bytes']['median']:.3f}",
        ]
        yield f"| {x:,} | {' | '.join(cells)} |"
    yield ""


def growth(xs: Sequence[int], panels: dict[str, Any]) -> str:
    """The exponent of each quantity over the whole range."""
    said = [
        f"{quantity} {', '.join(f'{exponent(xs, values):.2f} ({arm})' for arm, values in arms.items())}"
        for quantity, arms in panels.items()
    ]
    return f"Growth from {xs[0]:,} to {xs[-1]:,}: {'; '.join(said)}.\n"


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The `e` of `c * x**e`, fitted to the logarithms by least squares."""
    return linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def fixed(points: Points, field: str) -> str:
    """What is the same at all points."""
    names = ("vocabulary", "hidden", "layers", "batch", "length", "ranks")
    same = [name for name in names if name != field and len({point[name] for point in points}) == 1]
    rounds = [point["step"]["rounds"] for point in points]
    return f"{', '.join(f'{name} {points[0][name]}' for name in same)}, {min(rounds)} to {max(rounds)} rounds"


def shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if name != "date")
