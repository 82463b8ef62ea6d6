"""Rows that a loader repeats so that every rank draws as many: which they are, and a batch without them.

accelerate deals the batches of one order out to the ranks and fills the last round with rows from the order's
beginning. They are not items of the step: trained, they would count twice.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from accelerate.state import GradientState
from torch import Tensor


class UncountedBatch(dict[str, Any]):
    """A batch of repeated rows alone: its rank still runs a forward, with the others, and adds 0."""


def count_real_rows(rows: int, loader: Any) -> int:
    """How many of the `rows` rows last drawn from `loader` are this rank's own; the ones after them are repeated.

    A loader that accelerate did not shard repeats nothing.
    """
    shard = _shard(loader) if getattr(loader, "end_of_dataloader", False) else None
    if shard is None or shard.num_processes == 1 or not shard.even_batches or shard.drop_last:
        return rows
    share = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
    remainder = len(shard.batch_sampler.sampler) % (share * shard.num_processes)
    if remainder == 0:
        return rows
    return min(rows, max(0, remainder - shard.process_index * share))


def without_repeated_rows(batch: Any) -> Any:
    """`batch`, the last one drawn on this rank, cut to its own rows; an `UncountedBatch` where it has none."""
    rows = _rows(batch)
    real = count_real_rows(rows, GradientState().active_dataloader)
    if real == rows:
        return batch
    return UncountedBatch(batch) if real == 0 else first_rows(batch, real)


def first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` rows of every tensor that has one entry a row; all else as it is."""
    rows = _rows(batch)
    return {
        name: value[:count] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for name, value in batch.items()
    }


def _rows(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)


def _shard(loader: Any) -> BatchSamplerShard | None:
    """What deals the batches out, below whatever skips the batches of a resumed epoch."""
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, BatchSamplerShard):
        sampler = getattr(sampler, "batch_sampler", None)
    return sampler
