"""Orders that draw some rows more often than others: by the shares of their classes, or by weights of their own.

Labels or weights go in, a `Sampler` comes out, for `CustomTrainer(train_sampler=...)`. What is drawn in an epoch is a
function of the seed and the epoch alone, the same on every rank, and how often a row is drawn is fixed up to one draw:
nothing is left to luck but the order.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class _DrawnOrder(Sampler[int], ABC):
    """An epoch of `rows` draws, put in random order."""

    def __init__(self, rows: int | None, total: int, *, seed: int) -> None:
        self.rows = total if rows is None else rows
        if total == 0 or self.rows < 1:
            raise ValueError(f"{self.rows} draws from {total} rows: there is nothing to put in order.")
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        self.dataset_rows = total
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        yield from generator.permutation(self.draw(generator)).tolist()

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """The rows of this epoch, in any order: shape (rows,)."""


class ClassBalancedOrder(_DrawnOrder):
    """Every epoch has the classes in the shares that are asked for, to the row.

    A class of share `s` is drawn `s * rows` times an epoch (the largest remainders are rounded up, so that the sum is
    `rows`). It is drawn by going through permutations of its rows one after another, over all epochs: a rare class is
    repeated evenly (oversampling), a frequent one is used up over several epochs. After any number of epochs two rows of
    a class differ by one draw at most; within an epoch that begins in the middle of a permutation, by two.

    Args:
        labels: Shape (rows of the dataset,), the class of every row: numbers or strings.
        shares: The share of each class that occurs, summing to 1; equal shares without it.
        rows: Draws of an epoch; as many as the dataset has rows without it.
        seed: With the epoch, all that the order depends on.

    Raises:
        ValueError: There are no rows, or the shares do not fit the classes.
    """

    def __init__(
        self,
        labels: Sequence[Any] | np.ndarray,
        shares: Mapping[Any, float] | None = None,
        *,
        seed: int,
        rows: int | None = None,
    ) -> None:
        found = np.asarray(labels)
        if found.ndim != 1:
            raise ValueError(f"labels of shape {found.shape}: one class a row is needed.")
        super().__init__(rows, len(found), seed=seed)
        classes, of_row = np.unique(found, return_inverse=True)
        self.classes = classes.tolist()
        self.members = [np.flatnonzero(of_row == c) for c in range(len(classes))]
        self.counts = _to_the_row(_checked(shares, self.classes), self.rows)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        return np.concatenate([self._draw_class(c) for c in range(len(self.classes))])

    def _draw_class(self, c: int) -> np.ndarray:
        """The epoch's piece of the class's permutations, one behind the other."""
        members, count = self.members[c], self.counts[c]
        begin = self.epoch * count
        first, last = begin // len(members), (begin + count - 1) // len(members)
        passes = [
            np.random.default_rng([self.seed, c, number, 1]).permutation(members) for number in range(first, last + 1)
        ]
        start = begin - first * len(members)
        return np.concatenate([members[:0], *passes])[start : start + count]


class WeightedOrder(_DrawnOrder):
    """Rows are drawn in proportion to their weights.

    A row of weight `w` has an expected number of draws `n = rows * w / sum(weights)`, and is drawn `floor(n)` or
    `ceil(n)` times (systematic sampling, Madow 1949, https://doi.org/10.1214/aoms/1177729988; the rows are shuffled
    before, so that neighbours are not tied). So a row whose n is 1 or less is never drawn twice in an epoch, and over
    epochs its draws average n. `torch.utils.data.WeightedRandomSampler` draws each time anew, and leaves out a third of
    the rows even when all weights are equal.

    Args:
        weights: Shape (rows of the dataset,), 0 or more; a row of weight 0 is never drawn.
        rows: Draws of an epoch; as many as the dataset has rows without it.
        seed: With the epoch, all that the order depends on.

    Raises:
        ValueError: A weight is negative or no number, or none is above 0.
    """

    def __init__(self, weights: Sequence[float] | np.ndarray, *, seed: int, rows: int | None = None) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)
        if self.weights.ndim != 1:
            raise ValueError(f"weights of shape {self.weights.shape}: one number a row is needed.")
        super().__init__(rows, len(self.weights), seed=seed)
        wrong = np.flatnonzero(~(np.isfinite(self.weights) & (self.weights >= 0)))
        if len(wrong):
            raise ValueError(
                f"weights: row {wrong[0]} has {self.weights[wrong[0]]}; they must be finite and 0 or more."
            )
        if not self.weights.sum() > 0:
            raise ValueError("weights: all are 0, so that no row can be drawn.")

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        candidates = generator.permutation(np.flatnonzero(self.weights))
        edges = np.cumsum(self.weights[candidates])
        edges *= self.rows / edges[-1]
        edges[-1] = self.rows
        return candidates[np.searchsorted(edges, generator.random() + np.arange(self.rows), side="right")]


def _checked(shares: Mapping[Any, float] | None, classes: list[Any]) -> list[float]:
    """The share of each class, in the order of `classes`."""
    if shares is None:
        return [1 / len(classes)] * len(classes)
    found = ", ".join(map(str, classes))
    if set(shares) != set(classes):
        raise ValueError(f"shares name the classes {', '.join(map(str, shares))}, and the labels are {found}.")
    values = [float(shares[c]) for c in classes]
    if not (all(value >= 0 for value in values) and abs(math.fsum(values) - 1) <= 1e-6):
        raise ValueError(f"shares {dict(shares)} must be 0 or more and sum to 1; they sum to {math.fsum(values):g}.")
    return values


def _to_the_row(shares: list[float], rows: int) -> list[int]:
    """`shares` of `rows` as whole numbers that sum to `rows`: the largest remainders are rounded up."""
    exact = [share * rows / math.fsum(shares) for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda c: counts[c] - exact[c])
    for c in by_remainder[: rows - sum(counts)]:
        counts[c] += 1
    return counts
