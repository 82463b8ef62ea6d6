"""Metrics of classifiers that need no download: as `evaluate.Metric`, and as `compute_metrics` for a `Trainer`.

What each metric is stands in `table.py`.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score

from trainer_ext.metrics.counts import Counts, OnlyCounts
from trainer_ext.metrics.predictions import Predictions, check_label_names
from trainer_ext.metrics.running import RunningMetrics
from trainer_ext.metrics.table import OF_ROWS, choose_metrics, classification_metrics

DEFAULT_METRICS = ("accuracy", "f1")
DESCRIPTION = "Share of correct predictions, and F1: of class 1 for two classes (as GLUE does), else the macro mean."


class AccuracyAndF1(evaluate.Metric):
    """GLUE MRPC's pair of metrics over integer predictions and references, shape (N,) each.

    Args:
        num_labels: The number of classes; with more than two, F1 is the mean over those that occur.
    """

    def __init__(self, num_labels: int = 2, **kwargs: Any) -> None:
        self.num_labels = num_labels
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions and references: one class index an item.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        average = "binary" if self.num_labels == 2 else "macro"
        f1 = f1_score(references, predictions, average=average, zero_division=0.0)
        return {"accuracy": float(accuracy_score(references, predictions)), "f1": float(f1)}


class ComputeMetrics:
    """What `Trainer(compute_metrics=...)` takes; `compute_metrics` makes it.

    Attributes:
        last: The predictions of the last evaluation, for a picture of them; None before the first, and where
            `CustomTrainer` has counted them batch by batch (see `keep_rows`).
        label_names: The classes, by which the keys of per-class metrics are named.
    """

    def __init__(
        self,
        num_labels: int,
        metrics: str | Sequence[str],
        label_names: Sequence[str] | None,
        multi_label: bool,
        keep_rows: bool = False,
    ) -> None:
        self.metrics = choose_metrics(metrics, multi_label)
        self.label_names = check_label_names(label_names, num_labels)
        self.multi_label = multi_label
        self.needs_rows = keep_rows or any(name in OF_ROWS for name in self.metrics)
        self.last: Predictions | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        """The metrics of an `EvalPrediction`."""
        return self.of(prediction.predictions, prediction.label_ids)

    def of(self, logits: Any, labels: Any) -> dict[str, float]:
        """The metrics of logits and labels, as `Predictions.of` takes them."""
        self.last = Predictions.of(logits, labels, num_labels=len(self.label_names), multi_label=self.multi_label)
        return classification_metrics(self.last, self.metrics, self.label_names)

    def of_counts(self, counts: Counts) -> dict[str, float]:
        """The metrics where none needs the rows themselves."""
        self.last = None
        return classification_metrics(OnlyCounts(counts), self.metrics, self.label_names)

    def running_metrics(self) -> RunningMetrics:
        """The metrics of batches to come; `CustomTrainer.evaluate` asks for them, and then gathers no logits."""
        return RunningMetrics(self)


def compute_metrics(
    num_labels: int = 2,
    metrics: str | Sequence[str] = DEFAULT_METRICS,
    label_names: Sequence[str] | None = None,
    multi_label: bool = False,
    keep_rows: bool = False,
) -> ComputeMetrics:
    """What `Trainer(compute_metrics=...)` takes: logits of shape (.., C) and labels, those of -100 left out.

    Args:
        num_labels: C.
        metrics: Names in `METRICS`, or `all`. Precision and recall are one number a class, as `precision_<label>`.
        label_names: The classes, for these keys; by default their indices.
        multi_label: Whether labels are multi-hot, (N, C). A label is then predicted where its sigmoid is at least 0.5.
        keep_rows: Whether `CustomTrainer.evaluate` keeps every row's logits, for `last`, also where counts would do.

    Raises:
        ValueError: A metric is not known, or the names are not one a class.
    """
    return ComputeMetrics(num_labels, metrics, label_names, multi_label, keep_rows)


class ClassificationMetrics(evaluate.Metric):
    """The same as an `evaluate.Metric`: predictions are logits (N, C), references (N,), or multi-hot (N, C).

    Where there are probabilities instead of logits, give their logarithms, of which they are the softmax.
    The arguments are those of `compute_metrics`; further ones go to `evaluate.Metric`.
    """

    def __init__(
        self,
        num_labels: int = 2,
        metrics: str | Sequence[str] = "all",
        label_names: Sequence[str] | None = None,
        multi_label: bool = False,
        **kwargs: Any,
    ) -> None:
        self._metrics = compute_metrics(num_labels, metrics, label_names, multi_label)
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=f"Of a classifier: {', '.join(self._metrics.metrics)}.",
            citation="",
            inputs_description="predictions: the logits of an item. references: its class, or 0 or 1 for each label.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(label) if self._metrics.multi_label else label,
                }
            ),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return self._metrics.of(predictions, references)
