"""A drawing as SVG that stands in an HTML page itself: text stays text and takes the page's colours."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import matplotlib
from markupsafe import Markup, escape

from trainer_ext.plain_text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(draw: Callable[["Figure"], None], size: tuple[float, float], *, name: str, described: str) -> Markup:
    """Draw, and return the `<svg>` element. The same drawing is the same bytes.

    Args:
        draw: Is given an empty figure.
        size: Width and height in inches.
        name: Tells this drawing's inner ids from those of others in the page.
        described: The drawing in words, for those who do not see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}
    ):
        drawn = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasSVG(drawn)
        draw(drawn)
        for axes in drawn.axes:
            axes.set_facecolor("none")
            axes.grid(alpha=0.25)
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata={"Date": None})
    svg = printable(text.getvalue())
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(printable(described))}" ', 1))
