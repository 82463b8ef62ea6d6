"""Pictures of an evaluation: the confusion matrix, and precision over recall; SVG or PNG by the file's ending.

Text stays text in an SVG, and its `<title>` says in words what it shows.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import precision_recall_curve

from trainer_ext.metrics.predictions import Predictions
from trainer_ext.metrics.table import average_precision_of, ranks
from trainer_ext.plain_text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 1000  # of one curve: more cannot be told apart
COUNTS = 30  # with more classes than this, the cells of a confusion matrix are colours alone
COLUMN = 25  # rows of a legend


def save_pictures(predictions: Predictions, label_names: Sequence[str], folder: Path) -> list[Path]:
    """`confusion_matrix.svg` and `precision_recall.svg` in `folder`; the first only where a row has one label."""
    made = [] if predictions.multi_label else [folder / "confusion_matrix.svg"]
    for file in made:
        confusion_matrix(predictions, label_names, file)
    precision_recall(predictions, label_names, folder / "precision_recall.svg")
    return [*made, folder / "precision_recall.svg"]


def confusion_counts(predictions: Predictions) -> np.ndarray:
    """How many rows of each true class (first axis) are predicted as each class, (C, C)."""
    C = predictions.logits.shape[1]
    cells = predictions.references * C + predictions.predicted
    return np.bincount(cells, minlength=C * C).reshape(C, C)


def confusion_matrix(predictions: Predictions, label_names: Sequence[str], file: Path) -> None:
    """Counts of true and predicted classes; the colour is the share of the true class.

    Raises:
        ValueError: A row has several labels, and so no cell of its own.
    """
    if predictions.multi_label:
        raise ValueError("a confusion matrix needs one label a row, and these references are multi-hot.")
    counts = confusion_counts(predictions)
    C, right, rows = len(counts), int(np.trace(counts)), int(counts.sum())
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = 3 + 0.4 * min(C, 100)
    with drawn(file, f"Confusion matrix: {right} of {rows} rows right", (side + 1, side)) as axes:
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.figure.colorbar(image, label="share of the true class", shrink=0.8)
        names = [shortened(name) for name in label_names]
        axes.set_xticks(range(C), names, rotation=90 if C > 2 or max(map(len, names)) > 14 else 0)
        axes.set_yticks(range(C), names)
        axes.set(xlabel="predicted", ylabel="true")
        for (true, predicted), count in np.ndenumerate(counts) if C <= COUNTS else ():
            colour = "white" if share[true, predicted] > 0.5 else "black"
            axes.text(predicted, true, str(count), ha="center", va="center", color=colour)


def precision_recall(predictions: Predictions, label_names: Sequence[str], file: Path) -> None:
    """Precision over recall of class 1 of two, else of each class that occurs, with its average precision.

    A class whose scores are not numbers has no curve.
    """
    curves = [curve for curve in predictions.one_vs_rest() if curve[1].any() and not np.isnan(curve[2]).any()]
    columns = -(-len(curves) // COLUMN)
    title = f"Precision and recall of {len(predictions.references)} rows"
    with drawn(file, title, (6 + 2.5 * columns, 4.5)) as axes:
        for label, of_it, scores in curves:
            precision, recall, _ = precision_recall_curve(of_it, ranks(scores))
            shown = np.unique(np.linspace(0, len(recall) - 1, POINTS).astype(int))
            axes.plot(
                recall[shown],
                precision[shown],
                f"C{label % 10}" + ("-", "--", ":", "-.")[label // 10 % 4],
                drawstyle="steps-post",
                linewidth=1.4,
                label=f"AP {average_precision_of(of_it, scores):.3f}: {shortened(label_names[label])}",
            )
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        if curves:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1), ncols=columns, frameon=False)


@contextmanager
def drawn(file: Path, title: str, size: tuple[float, float]) -> Iterator["Axes"]:
    """Axes to draw on, written to `file` at the end. The same picture is the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with (
        matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "text.parse_math": False}
        ),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # an SVG's reader has fonts of its own
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        yield axes
        metadata = {"Title": title, **({"Date": None} if file.suffix == ".svg" else {})}
        figure.savefig(file, dpi=150, metadata=metadata)


def shortened(name: str, length: int = 24) -> str:
    """A class name that leaves room for the picture, and is no control code in it."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
