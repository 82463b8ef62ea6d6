"""The logits of a classifier beside the true classes: checked once, then read by metrics and pictures.

N is the number of rows and C of classes. A row is an item of any kind: a text, or a token of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trainer_ext.metrics.counts import Counts

IGNORED = -100  # a label that stands for no class, such as that of padding


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits and references of N rows; `Predictions.of` makes and checks them.

    Attributes:
        logits: (N, C), as the model gave them. They need not be finite.
        references: The true class of each row, (N,); or with several labels a row, 0 or 1 for each, (N, C).
    """

    logits: np.ndarray
    references: np.ndarray

    @classmethod
    def of(cls, logits: Any, labels: Any, *, num_labels: int, multi_label: bool = False) -> "Predictions":
        """The rows that count.

        Args:
            logits: (.., C), or a tuple of outputs of which they are the first.
            labels: (..), where -100 leaves a row out; or multi-hot, (.., C).
            num_labels: C.
            multi_label: Whether `labels` are multi-hot.

        Raises:
            ValueError: The shapes do not fit each other, or a label is none of the classes.
        """
        logits, labels = np.asarray(logits[0] if isinstance(logits, tuple) else logits), np.asarray(labels)
        check_shapes(logits.shape, labels.shape, num_labels, multi_label)
        logits, labels = logits.reshape(-1, num_labels), labels.reshape((-1, num_labels) if multi_label else -1)
        _check_labels(labels, range(2 if multi_label else num_labels), ignored=not multi_label)
        kept = labels != IGNORED
        if not kept.all():
            logits, labels = logits[kept], labels[kept]
        return cls(logits, labels.astype(np.int64))

    @property
    def multi_label(self) -> bool:
        return self.references.ndim == 2

    @property
    def binary(self) -> bool:
        """Whether there are two classes, of which class 1 is the one that is looked for."""
        return not self.multi_label and self.logits.shape[1] == 2

    @cached_property
    def predicted(self) -> np.ndarray:
        """The class of the largest logit, (N,); or the labels whose sigmoid is at least 0.5, (N, C)."""
        return (self.logits >= 0).astype(np.int64) if self.multi_label else np.argmax(self.logits, axis=-1)

    @cached_property
    def counts(self) -> Counts:
        """What most metrics need of the rows."""
        return Counts.of(self.predicted, self.references, self.logits.shape[1])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The softmax in float64, (N, C); NaN throughout a row that has NaN or +inf."""
        logits = self.logits.astype(np.float64)
        with np.errstate(invalid="ignore"):
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            # sorted, so that rows whose logits are the same in another order have the same sum, and stay tied
            return powers / np.sort(powers, axis=-1).sum(axis=-1, keepdims=True)

    def one_vs_rest(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each class, whether a row is of it, (N,) bool, and a score that rises with its probability, (N,).

        Two classes give class 1 alone. Its score is the difference of the logits, which still tells rows apart where
        the probability is rounded to 1.
        """
        if self.binary:
            with np.errstate(invalid="ignore"):
                yield 1, self.references == 1, np.diff(self.logits.astype(np.float64), axis=-1)[:, 0]
        else:
            scores = self.logits if self.multi_label else self.probabilities
            for label in range(scores.shape[1]):
                of_it = self.references[:, label] if self.multi_label else self.references == label
                yield label, of_it.astype(bool), scores[:, label]


def check_label_names(label_names: Sequence[Any] | None, num_labels: int) -> list[str]:
    """One name a class; without names their indices.

    Raises:
        ValueError: There are more or fewer names than classes, or one twice.
    """
    names = [str(name) for name in (range(num_labels) if label_names is None else label_names)]
    if len(set(names)) != num_labels or len(names) != num_labels:
        raise ValueError(f"label_names={names}: give each of the {num_labels} classes a name of its own.")
    return names


def check_shapes(logits: tuple[int, ...], labels: tuple[int, ...], num_labels: int, multi_label: bool) -> None:
    """Raise a ValueError where logits and labels of these shapes do not fit each other."""
    needed = labels if multi_label else (*labels, num_labels)
    if not labels or logits != needed or logits[-1] != num_labels:
        shape = f"multi-hot labels (N, {num_labels})" if multi_label else "labels (N,)"
        raise ValueError(
            f"logits of shape {logits} and labels of shape {labels} do not fit: {num_labels} classes "
            f"need logits (N, {num_labels}) and {shape}."
        )


def _check_labels(labels: np.ndarray, classes: range, ignored: bool) -> None:
    wrong = np.argwhere(~np.isin(labels, [*classes, IGNORED] if ignored else classes))
    if len(wrong):
        place = tuple(wrong[0])
        besides = f", nor {IGNORED}, which leaves a row out" if ignored else ""
        raise ValueError(f"label {labels[place]} in row {place[0]} is none of 0 to {classes[-1]}{besides}.")
