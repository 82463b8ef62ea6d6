"""Accuracy and F1 as an `evaluate.Metric` that needs no download, and the `compute_metrics` for a `Trainer`."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score

METRICS = ("accuracy", "f1")
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


def compute_metrics(num_labels: int = 2) -> Callable[[Any], dict[str, float]]:
    """What `Trainer(compute_metrics=...)` takes: logits of shape (..., C) and labels, those of -100 left out."""
    metric = AccuracyAndF1(num_labels)

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple) else logits
        kept = labels != -100
        return metric.compute(predictions=np.argmax(logits, axis=-1)[kept], references=labels[kept])

    return compute
