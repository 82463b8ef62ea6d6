"""The metrics of a classifier, each a function of `Predictions`, in one table by name: `METRICS`.

All but those `OF_ROWS` read the predictions' `counts` alone, which add up over batches.

A metric that the split does not define, such as AUROC where there is one class, is left out of the result; whether it is
there never depends on what was predicted. The precision of a class that is never predicted is 0. Logits that are not
finite never raise: predicted classes are those of `argmax`, and what needs the logits' order or size is NaN.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from trainer_ext.metrics.counts import CountedRows, Counts
from trainer_ext.metrics.predictions import Predictions

BINS = 15
Value = float | list[float | None] | None


def accuracy(p: CountedRows) -> float:
    """The share of rows whose class, or whose every label, is predicted."""
    return p.counts.right / p.counts.rows


def balanced_accuracy(p: CountedRows) -> float:
    """The mean recall of the classes that occur."""
    occurs = p.counts.true > 0
    return float(np.mean(p.counts.hits[occurs] / p.counts.true[occurs]))


def f1(p: CountedRows) -> float:
    """F1 of class 1 for two classes, else the macro mean."""
    return float(_f1_of_each(p.counts)[1]) if p.counts.binary else f1_macro(p)


def f1_macro(p: CountedRows) -> float:
    """The mean F1 of the classes that occur or are predicted, or of all labels."""
    c = p.counts
    return float(np.mean(_f1_of_each(c)[c.multi_label | (c.true + c.guessed > 0)]))


def f1_micro(p: CountedRows) -> float:
    """F1 of all classes' counts together."""
    c = p.counts
    return float(_ratio(2 * c.hits.sum(), c.true.sum() + c.guessed.sum()))


def mcc(p: CountedRows) -> float | None:
    """Matthews' correlation of predicted and true classes; 0 where one class alone is predicted."""
    true, guessed, rows = p.counts.true.astype(float), p.counts.guessed.astype(float), float(p.counts.rows)
    if (true > 0).sum() < 2:
        return None
    spread = (rows**2 - guessed @ guessed) * (rows**2 - true @ true)
    return float((p.counts.hits.sum() * rows - true @ guessed) / math.sqrt(spread)) if spread else 0.0


def auroc(p: Predictions) -> float | None:
    """Area under the ROC curve: the share of pairs that are in order, of class 1 or as the mean of one-vs-rest."""
    curves = [(of_it, scores) for _, of_it, scores in p.one_vs_rest() if of_it.any() and not of_it.all()]
    return _mean([_of_order(roc_auc_score, *curve) for curve in curves])


def average_precision(p: Predictions) -> float | None:
    """Σ (recall_k - recall_{k-1}) precision_k over thresholds k, of class 1 or as the mean of one-vs-rest."""
    curves = [(of_it, scores) for _, of_it, scores in p.one_vs_rest() if of_it.any()]
    return _mean([average_precision_of(*curve) for curve in curves])


def average_precision_of(of_it: np.ndarray, scores: np.ndarray) -> float:
    """Of one class: whether a row is of it, and its score, (N,) each."""
    return _of_order(average_precision_score, of_it, scores)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of the scores, equal for equal ones: sklearn refuses scores that are not finite."""
    return np.unique(scores, return_inverse=True)[1]


def calibration_error(p: Predictions) -> float:
    """How far confidence, the largest probability, is from the share of correct predictions (ECE).

    ECE = Σ_m |B_m| / N * |accuracy(B_m) - confidence(B_m)|, where B_m are the rows whose confidence lies in
    ((m - 1) / 15, m / 15]. Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    confidence = p.probabilities.max(axis=-1)
    if not np.isfinite(confidence).all():
        return math.nan
    bins = np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)
    gaps = np.bincount(bins, weights=(p.predicted == p.references) - confidence)  # |B_m| * (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def precision(p: CountedRows) -> Value:
    """Of each class, the share of the rows predicted as it that are of it."""
    return _ratio(p.counts.hits, p.counts.guessed).tolist()


def recall(p: CountedRows) -> Value:
    """Of each class that occurs, the share of its rows that are predicted as it."""
    shares = _ratio(p.counts.hits, p.counts.true)
    return [share if rows else None for share, rows in zip(shares.tolist(), p.counts.true, strict=True)]


def _f1_of_each(c: Counts) -> np.ndarray:
    return _ratio(2 * c.hits, c.true + c.guessed)


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """0 where the whole is 0."""
    return np.asarray(part / np.maximum(whole, 1))


def _of_order(score: Callable[..., Any], of_it: np.ndarray, scores: np.ndarray) -> float:
    return math.nan if np.isnan(scores).any() else float(score(of_it, ranks(scores)))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


METRICS: dict[str, Callable[[Any], Value]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "mcc": mcc,
    "auroc": auroc,
    "average_precision": average_precision,
    "calibration_error": calibration_error,
    "precision": precision,
    "recall": recall,
}
PER_CLASS = ("precision", "recall")  # these give one number a class, as precision_<label>
OF_ROWS = ("auroc", "average_precision", "calibration_error")  # these need every row's logits, the others counts
OF_ONE_LABEL = ("balanced_accuracy", "mcc", "calibration_error")  # of rows that have exactly one label


def choose_metrics(metrics: str | Sequence[str], multi_label: bool = False) -> list[str]:
    """The names that are meant: `all`, one name, or several.

    Raises:
        ValueError: A name is not known, or not defined for several labels a row.
    """
    choices = [name for name in METRICS if not (multi_label and name in OF_ONE_LABEL)]
    asked = choices if metrics == "all" else [metrics] if isinstance(metrics, str) else list(metrics)
    if unknown := [name for name in asked if name not in choices]:
        of = " of several labels a row" if multi_label else ""
        raise ValueError(f"metric {unknown[0]!r}{of} is not known. Choices: all, {', '.join(choices)}.")
    return asked


def metric_keys(metrics: str | Sequence[str], label_names: Sequence[str]) -> list[str]:
    """The keys that these metrics have in a result."""
    asked = choose_metrics(metrics)
    keys = [[f"{name}_{label}" for label in label_names] if name in PER_CLASS else [name] for name in asked]
    return [key for several in keys for key in several]


def classification_metrics(
    predictions: CountedRows, metrics: Sequence[str], label_names: Sequence[str]
) -> dict[str, float]:
    """The metrics of these names, those left out that the split does not define; without rows there are none."""
    found: dict[str, float | None] = {}
    for name in metrics if predictions.counts.rows else ():
        value = METRICS[name](predictions)
        if isinstance(value, list):
            found |= {f"{name}_{label}": share for label, share in zip(label_names, value, strict=True)}
        else:
            found[name] = value
    return {key: value for key, value in found.items() if value is not None}
