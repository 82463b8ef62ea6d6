"""The curves of a report, as SVG that stands in the page itself and takes the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from trainer_ext.inline_svg import inline_svg

QUANTITIES = {
    "loss": "Loss of each step",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Highest learning rate",
}
FLOOR = 1e-18  # where a difference of 0 is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One run of a mode against its reference; `values` and `reference` are by step, None where a path does not say."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    reference: Sequence[float | None]
    judged: bool = True

    @property
    def gaps(self) -> list[float]:
        """The relative difference of each step; NaN where a number is missing or not finite."""
        pairs = zip(self.values, self.reference, strict=False)
        return [
            abs(y - x) / abs(x) if x and y is not None else abs(y or 0.0) if x == 0.0 else math.nan for y, x in pairs
        ]


def figure(quantity: str, lines: list[Line]) -> Markup:
    """An inline SVG: the quantity of all runs over the steps, and below it each run's difference from its reference."""
    title = QUANTITIES[quantity]

    def draw(drawn: Figure) -> None:
        top, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for line in lines:
            dash, values = "-" if line.judged else ":", [math.nan if v is None else v for v in line.values]
            top.plot(line.steps, values, dash, linewidth=1.2, label=line.name)
            below.plot(line.steps[: len(line.gaps)], [max(gap, FLOOR) for gap in line.gaps], dash, linewidth=1.2)
        top.set_ylabel(title)
        below.set(xlabel="optimizer step", ylabel="relative difference", yscale="log")
        if lines:
            top.legend(fontsize="small", framealpha=0, ncols=min(4, len(lines)))

    return inline_svg(draw, (8, 4.8), name=quantity, described=described(title, lines))


def described(title: str, lines: list[Line]) -> str:
    """The figure in words, for those who do not see it."""
    numbers = [value for line in lines for value in line.values if value is not None and math.isfinite(value)]
    if not numbers:
        return f"{title}: no run says it."
    worst = max(lines, key=lambda line: max((gap for gap in line.gaps if not math.isnan(gap)), default=0.0))
    gap = max((gap for gap in worst.gaps if not math.isnan(gap)), default=math.nan)
    return (
        f"{title} of {', '.join(line.name for line in lines)} over {max(len(line.steps) for line in lines)} steps, from "
        f"{min(numbers):.4g} to {max(numbers):.4g}; the largest relative difference from the reference is {gap:.2g}, in "
        f"{worst.name}."
    )
