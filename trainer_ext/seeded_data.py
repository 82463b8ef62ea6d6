"""Random data as a function of the seed, the epoch and the row, drawn when the row is fetched.

A `DataLoader` goes in and gives the same batches wherever they are fetched: in any worker process or in none, ahead of
their step or not, in a run from its start or one that goes on in the middle of an epoch. The global random generators
of Python, numpy and torch are as they were after each fetch, so that the data and the model's dropout do not move each
other. So are those of an accelerator, which are left alone.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from types import FunctionType
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, IterDataPipe, TensorDataset, get_worker_info

GLOBAL: Any = np.random  # its own types leave these functions out
PLAIN_ROWS = (list, tuple, TensorDataset, datasets.Dataset)
PLAIN_STREAM = "ArrowExamplesIterable"  # of datasets: rows of files or of a table
PASSED_ON = (  # rows of the stream below, in an order that has a generator of its own; no function of the user's
    "BufferShuffledExamplesIterable",
    "InterleavedShardsExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "RepeatExamplesIterable",
    "SelectColumnsIterable",
    "SkipExamplesIterable",
    "TakeExamplesIterable",
)
PLAIN_COLLATORS = ("default_data_collator", "DefaultDataCollator", "DataCollatorWithPadding")  # of transformers
NUMPY = np.random.MT19937(0)  # what numpy's functions draw from during a fetch: to copy their state takes longer


def seed_data(loader: Any, *, seed: int, epoch: int, rank: int = 0) -> None:
    """Have what is random in a loader's data depend on its place alone, from the next iteration on.

    A row is drawn at (seed, epoch, row number), or with its batch's rows where the dataset fetches several at once
    (`__getitems__`). A row of a stream is drawn at (seed, epoch, rank, worker, place in the stream), and what the collator
    does at the last of its rows. Generators that are attributes of the dataset or the collator are seeded like the global
    ones; what they keep deeper inside is theirs.

    Args:
        loader: A `DataLoader`, prepared by accelerate or not; other iterables are left as they are, and so is one in which
            nothing is random.
        seed: Of the run's data.
        epoch: From 0. Workers that live on hear of it too.
        rank: Of this process, where the ranks read different streams.
    """
    base = getattr(loader, "base_dataloader", loader)
    if not isinstance(base, DataLoader) or isinstance(base.dataset, IterDataPipe):
        return
    if epoch and base.persistent_workers:
        base.generator = torch.Generator()  # a whole run draws the workers' seed in its first epoch, and not again
    one_for_all = (
        type(base.dataset).__name__ == "IterableDatasetShard"
    )  # accelerate's: every rank reads the whole stream
    holder: Any = base.dataset if one_for_all else base
    if draws_nothing(holder.dataset, base.collate_fn):
        return
    if not isinstance(holder.dataset, _SeededData):
        stream = isinstance(holder.dataset, IterableDataset)
        run = (seed, rank if stream and not one_for_all else 0)
        seeded = (SeededStream if stream else SeededRows)(holder.dataset, base.collate_fn, run)
        vars(holder)["dataset"] = seeded  # a DataLoader refuses to be given another, of other rows
        base.collate_fn = seeded.collate
    holder.dataset.epoch.fill_(epoch)


def draws_nothing(data: Any, collate: Any) -> bool:
    """Whether rows and batches are known to be the same however often they are fetched: plain ones, and padding."""
    transformed = type(data) is datasets.Dataset and data.format["type"] == "custom"  # by set_transform
    collator = getattr(collate, "data_collator", collate)  # below the one that removes columns
    kind: Any = collator if isinstance(collator, FunctionType) else type(collator)
    pads = kind.__module__ == "transformers.data.data_collator" and kind.__name__ in PLAIN_COLLATORS
    return (type(data) in PLAIN_ROWS or _is_plain_stream(data)) and not transformed and pads


def _is_plain_stream(data: Any) -> bool:
    """Whether a stream's rows go through no function that may draw, such as one of `map`."""
    below = getattr(data, "_ex_iterable", None) if type(data) is datasets.IterableDataset else None
    while type(below).__name__ in PASSED_ON:
        below = below.ex_iterable  # type: ignore[union-attr]
    return type(below).__name__ == PLAIN_STREAM


class _SeededData:
    """A dataset and its collator, and where their randomness stands."""

    def __init__(self, data: Any, collate: Any, run: tuple[int, int]) -> None:
        self.data = data
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._collate = collate
        self._run = run
        self._place: Any = None  # of what was fetched last
        collator = getattr(collate, "data_collator", collate)  # below the one that removes columns
        if getattr(collator, "seed", None) is not None and hasattr(collator, "get_generator"):
            collator.generator = collator.get_generator(collator.seed)  # else each process makes its own, later
        self._owners = (data, collator)

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "data" not in vars(self):
            raise AttributeError(name)
        return getattr(self.data, name)

    def collate(self, items: Any) -> Any:
        """A batch of what was fetched last."""
        with kept_generators():
            self._seed(("collate", self._place))
            return self._collate(items)

    def _seed(self, place: Any) -> None:
        """Seed the global generators and those of the dataset and the collator, each with another number."""
        name = repr((self._run, self.epoch.item(), place)).encode()
        numbers = np.frombuffer(blake2b(name).digest(), dtype=np.uint32).tolist()
        random.seed(numbers[0] << 32 | numbers[1])
        np.random.seed(numbers[2])
        torch.default_generator.manual_seed(numbers[3] << 32 | numbers[4])
        for owner in self._owners:
            for generator in getattr(owner, "__dict__", {}).values():
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(numbers[5] << 32 | numbers[6])
                elif isinstance(generator, random.Random):
                    generator.seed(numbers[7] << 32 | numbers[8])
                elif isinstance(generator, np.random.Generator):
                    kind = type(generator.bit_generator)
                    generator.bit_generator.state = kind(numbers[9:13]).state


class SeededRows(_SeededData, Dataset[Any]):
    """Rows that are fetched by number."""

    def __getitem__(self, number: Any) -> Any:
        self._place = number
        with kept_generators():
            return self._row(number)

    def __getitems__(self, numbers: list[Any]) -> list[Any]:
        self._place = numbers
        several = getattr(self.data, "__getitems__", None)
        with kept_generators():
            if several is None:
                return [self._row(number) for number in numbers]
            self._seed(numbers)
            return several(numbers)

    def _row(self, number: Any) -> Any:
        self._seed(number)
        return self.data[number]


class SeededStream(_SeededData, IterableDataset[Any]):
    """Rows that come one after the other."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        self._place = [0 if worker is None else worker.id, 0]
        with kept_generators():
            self._seed(("begin", self._place))
            rows = iter(self.data)
        while True:
            with kept_generators():
                self._seed(self._place)
                try:
                    row = next(rows)
                except StopIteration:
                    return
            self._place[1] += 1
            yield row


@contextmanager
def kept_generators() -> Iterator[None]:
    """Have the global random generators of the CPU as they were, at the end."""
    python, numpy, cpu = random.getstate(), GLOBAL.get_bit_generator(), torch.default_generator.get_state()
    GLOBAL.set_bit_generator(NUMPY)
    try:
        yield
    finally:
        random.setstate(python)
        GLOBAL.set_bit_generator(numpy)
        torch.default_generator.set_state(cpu)
