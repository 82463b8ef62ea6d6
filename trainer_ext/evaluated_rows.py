"""The rows of an evaluation: drawn longest first, so that batches need little padding, and put back into their order.

A dataset goes in, `LongestFirst` draws its rows; the arrays of every batch go in, `put_together` makes one of them, with
the rows where the dataset has them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from trainer_ext.samplers import holds_lists, measure_rows

MOST_ROWS = 1_000_000  # of more, the lengths are not read
PADDING = -100  # as `Trainer` pads


class LongestFirst(Sampler[int]):
    """The rows of a dataset in their order; longest first within `sorted_rows`.

    Batches are then of like length, and the first is the largest: too little memory shows at once.
    """

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        yield from range(len(self)) if self.order is None else self.order.tolist()

    @contextmanager
    def sorted_rows(self) -> Iterator[np.ndarray]:
        """While this lasts, rows are drawn in the order that it gives; rows of one length in the dataset's."""
        self.order = measure_rows(self.dataset, self.column).argsort(descending=True, stable=True).numpy()
        try:
            yield self.order
        finally:
            self.order = None


def has_cheap_lengths(dataset: Any, column: str) -> bool:
    """Whether the rows' lengths are read from a table in one pass."""
    return isinstance(dataset, Dataset) and 0 < len(dataset) <= MOST_ROWS and holds_lists(dataset, column)


def sampler_of(loader: Any) -> LongestFirst | None:
    """The `LongestFirst` that `loader` draws from, below accelerate's layers."""
    layer = getattr(loader, "batch_sampler", None)
    while layer is not None:
        if isinstance(sampler := getattr(layer, "sampler", None), LongestFirst):
            return sampler
        layer = getattr(layer, "batch_sampler", None)
    return None


def put_together(batches: Any, order: np.ndarray | None) -> Any:
    """One array of the batches' arrays, nested as they are, each row in its place; the list is used up.

    As `Trainer` does batch after batch, which copies all rows each time, the second axis is padded with -100 to the
    longest.

    Args:
        batches: A list of arrays of shape (rows, ..), or of tuples, lists or mappings of them; None for none.
        order: The row that was drawn first, second and so on; None where that is the dataset's order. An array that
            has other than one entry for each of them stays as it was drawn.
    """
    if not batches:
        return batches
    first = batches[0]
    if isinstance(first, list | tuple):
        return type(first)(put_together(list(parts), order) for parts in zip(*batches, strict=True))
    if isinstance(first, Mapping):
        return type(first)({name: put_together([batch[name] for batch in batches], order) for name in first})  # type: ignore[call-arg]
    shapes = [np.atleast_1d(batch).shape for batch in batches]
    rows, width = sum(shape[0] for shape in shapes), max(shape[1:2] for shape in shapes)
    whole = np.empty((rows, *width, *shapes[0][2:]), dtype=np.asarray(first).dtype)
    places = order if order is not None and len(order) == rows else None
    done = 0
    batches.reverse()
    while batches:
        batch = np.atleast_1d(batches.pop())
        here: Any = slice(done, done + len(batch)) if places is None else places[done : done + len(batch)]
        if batch.shape[1:2] == width:
            whole[here] = batch
        else:
            whole[here, : batch.shape[1]] = batch
            whole[here, batch.shape[1] :] = PADDING
        done += len(batch)
    return whole
