"""Which rows of the dataset a batch was made of, read from the order that its loader draws.

A `DataLoader` as `Trainer` prepares it goes in, with the place of a batch in the epoch; row numbers come out. The
order is drawn a second time from copies, so that the training's own is not moved.
"""

import copy
from itertools import islice
from typing import Any

from torch.utils.data import SequentialSampler


def rows_of_batch(loader: Any, epoch: int, batch: int) -> list[int] | None:
    """The rows of this rank's batch number `batch` (from 0) of an epoch; None where they cannot be told.

    They can where the order is that of the dataset, or depends on the epoch that the sampler is told (`set_epoch`), as
    with `Trainer`'s own shuffling. They cannot for a stream, for batches that one rank hands out to the others, and for
    samplers that draw by a generator which has moved on since.
    """
    batches = getattr(loader, "batch_sampler", None)
    if batches is None or type(loader).__name__ == "DataLoaderDispatcher":
        return None
    again = _copied(batches, epoch)
    rows = next(islice(iter(again), batch, None), None) if again is not None else None
    return list(rows) if rows is not None else None


def _copied(sampler: Any, epoch: int) -> Any:
    """A copy that draws the order of `epoch`, down through the batch samplers; None if it would be another order."""
    if isinstance(sampler, SequentialSampler):
        return sampler
    made = copy.copy(sampler)
    for name in ("batch_sampler", "sampler"):
        if (below := getattr(sampler, name, None)) is not None:
            inner = _copied(below, epoch)
            if inner is None:
                return None
            setattr(made, name, inner)
            return made
    if not (hasattr(made, "set_epoch") and hasattr(made, "epoch")):
        return None
    made.set_epoch(epoch)
    if hasattr(made, "generator"):
        made.generator = None  # seeded by the epoch, in the copy too
    return made
