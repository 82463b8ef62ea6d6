"""Rows that a loader repeats so that every rank draws as many: which they are, and a batch without them.

accelerate deals the batches of one order out to the ranks and fills the last round with rows from the order's
beginning, a stream's with rows of its first round. They are not items of the step: trained, they would count twice.
"""

import math
from collections.abc import Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from accelerate.state import GradientState
from torch import Tensor


class UncountedBatch(dict[str, Any]):
    """A batch of repeated rows alone: its rank still runs a forward, with the others, and adds 0."""


def count_real_rows(rows: int, loader: Any) -> int:
    """How many of the `rows` rows last drawn from `loader` are this rank's own; the ones after them are repeated.

    A loader that accelerate did not shard repeats nothing.

    Raises:
        ValueError: Every rank reads one stream, whose end nobody can foresee.
    """
    _refuse_uncounted_stream(getattr(loader, "dataset", None))
    if not getattr(loader, "end_of_dataloader", False):
        return rows
    if isinstance(loader, DataLoaderDispatcher):  # rank 0 drew `remainder` rows for all, dealt out in equal shares
        share = math.ceil(loader.remainder / loader.state.num_processes)
        return min(rows, max(0, loader.remainder - loader.state.process_index * share))
    shard = _shard(loader)
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


def whole_window(batches: list[Any], size: int) -> list[Any]:
    """A stream's last window, filled up to `size` batches that count nothing: `Trainer`, which does not see a
    stream end, steps after whole windows only, and would add this one's gradient to the next epoch's first."""
    return batches + [UncountedBatch(batches[-1])] * (size - len(batches))


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


def _refuse_uncounted_stream(dataset: Any) -> None:
    if isinstance(dataset, IterableDatasetShard) and dataset.num_processes > 1 and not dataset.drop_last:
        raise ValueError(
            "accelerator_config.dispatch_batches=False has each of the "
            f"{dataset.num_processes} ranks read the whole stream, whose last rows are then filled up with its first, and "
            "nobody knows how many. Leave dispatch_batches out (rank 0 reads the stream for all), or use a dataset with a "
            "length, or a datasets.IterableDataset with a shard for each rank."
        )
