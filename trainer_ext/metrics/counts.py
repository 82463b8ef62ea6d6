"""What most metrics of a classifier need of its predictions: a few whole numbers a class, which add up over batches.

C is the number of classes. A row is an item of any kind: a text, or a token of one.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Counts:
    """Rows counted by class, or by label where a row has several.

    Attributes:
        rows: How many rows there are.
        right: Of how many the class, or every label, is predicted.
        true: How many are of each class, (C,).
        guessed: How many are predicted as each class, (C,).
        hits: How many are both, (C,).
        multi_label: Whether a row has several labels.
    """

    rows: int
    right: int
    true: np.ndarray
    guessed: np.ndarray
    hits: np.ndarray
    multi_label: bool = False

    @classmethod
    def of(cls, predicted: np.ndarray, references: np.ndarray, num_labels: int) -> "Counts":
        """Of classes, (N,), or of labels that are 0 or 1, (N, C)."""
        if references.ndim == 2:
            hits = (predicted * references).sum(axis=0)
            right = int((predicted == references).all(axis=1).sum())
            return cls(len(references), right, references.sum(axis=0), predicted.sum(axis=0), hits, multi_label=True)
        rows = (references, predicted, references[predicted == references])
        true, guessed, hits = (np.bincount(some, minlength=num_labels) for some in rows)
        return cls(len(references), int(hits.sum()), true, guessed, hits)

    @property
    def binary(self) -> bool:
        """Whether there are two classes, of which class 1 is the one that is looked for."""
        return not self.multi_label and len(self.true) == 2


class CountedRows(Protocol):
    """Anything whose rows are counted."""

    @property
    def counts(self) -> Counts: ...


@dataclass(frozen=True, eq=False)
class OnlyCounts:
    """Rows of which nothing is left but their counts."""

    counts: Counts
