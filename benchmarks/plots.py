"""Plots of records as SVG files: text stays text, and ink is light or dark as the reader's system asks for."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from trainer_ext.inline_svg import inline_svg

INK = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
COLOURS = {"Trainer": "#d1780f", "CustomTrainer": "#2f81f7"}  # both stand out on white and on black


def save(
    docs: Path, name: str, described: str, draw: Callable[[Figure], None], size: tuple[float, float] = (8, 3)
) -> None:
    """Draw, and write `docs/performance/NAME.svg`."""
    (docs / "performance").mkdir(parents=True, exist_ok=True)
    text = str(inline_svg(draw, size, name=name, described=described))
    (docs / "performance" / f"{name}.svg").write_text(text.replace(">", f">{INK}", 1))


def dots(drawn: Figure, ratios: Mapping[str, Any], kind: str, base: str) -> None:
    """The ratio of each arm: its median, and a line from the smallest to the largest."""
    axes = drawn.subplots()
    for height, (name, values) in enumerate(ratios.items()):
        found = values[kind]
        axes.plot([found["min"], found["max"]], [height, height], color=COLOURS.get(name, "#8b949e"))
        axes.plot(found["median"], height, "o", color=COLOURS.get(name, "#8b949e"))
    axes.axvline(1, linewidth=0.8, linestyle=":", color="#8b949e")
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.set_xlabel(f"{kind} time, ratio to {base}")


def growing(
    drawn: Figure, label: str, xs: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """On logarithmic axes a panel for each quantity, and in it a line for each arm."""
    for axes, (quantity, arms) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in arms.items():
            axes.plot(xs, values, "o-", markersize=4, linewidth=1.2, color=COLOURS[name], label=name)
        axes.set(xscale="log", yscale="log", title=quantity)
        for axis in (axes.xaxis, axes.yaxis):  # plain numbers: mathematics would stand in the file as it is written
            axis.set_major_formatter(EngFormatter(sep=""))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(EngFormatter(sep=""))
    drawn.supxlabel(label, fontsize="medium")
    axes.legend(fontsize="small", framealpha=0)
