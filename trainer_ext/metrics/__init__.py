"""Metrics of classifiers that need no download: a table of functions, `evaluate.Metric`s, and pictures."""

from trainer_ext.metrics.for_trainer import (
    DEFAULT_METRICS,
    AccuracyAndF1,
    ClassificationMetrics,
    ComputeMetrics,
    compute_metrics,
)
from trainer_ext.metrics.table import METRICS

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "AccuracyAndF1",
    "ClassificationMetrics",
    "ComputeMetrics",
    "compute_metrics",
]
