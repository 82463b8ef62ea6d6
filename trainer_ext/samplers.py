"""The order of an epoch as a function of the seed and the epoch alone: the same on every rank.

accelerate deals one order out to the ranks, micro-batch by micro-batch. Where each rank draws an order of its own,
some rows are trained twice and others never. In goes the length of every row, out comes a `Sampler`;
`ExactOrderMixin` gives it to a `Trainer` and sees to it that the epoch arrives.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import has_length

from trainer_ext.seeded_data import seed_data
from trainer_ext.token_budget import TokenBudgetBatches

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

STEPS_SORTED_TOGETHER = 50  # more would group closer and mix less


class LengthGroupedOrder(Sampler[int]):
    """Rows of like length in one optimizer step, in an order that depends on `seed` and the epoch alone.

    Every epoch is a permutation of all rows, cut into steps of `step_size` rows. A step's rows have similar
    lengths, the longest first, so that consecutive micro-batches of it, which go to different ranks, need about
    as much padding. The first step holds the longest row, so that too little memory shows at once; the others
    come in random order. Rows that fill no whole step come last, drawn at random: dropping them
    (`dataloader_drop_last`) favours no length.

    Args:
        lengths: Shape (rows,), a number a row; a list will do.
        step_size: The rows of one optimizer step, over all its micro-batches and ranks. Equal sizes give equal
            orders, however a step is split.
        seed: Epoch e is drawn with `seed + e`.

    Raises:
        ValueError: There are no rows, or steps of less than one.
    """

    def __init__(self, lengths: Tensor | Sequence[float], step_size: int, *, seed: int) -> None:
        if len(lengths) == 0 or step_size < 1:
            raise ValueError(f"{len(lengths)} rows in steps of {step_size}: there is nothing to put in order.")
        self.dataset_rows = len(lengths)
        self.lengths = torch.as_tensor(lengths)
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        longest = int(self.lengths[order].argmax())
        order[0], order[longest] = order[longest].item(), order[0].item()
        steps = len(order) // self.step_size
        whole, rest = order[: steps * self.step_size], order[steps * self.step_size :]
        together = min(STEPS_SORTED_TOGETHER, max(1, steps // 4)) * self.step_size
        grouped = torch.cat([self._longest_first(rows) for rows in whole.split(together)])
        others = 1 + torch.randperm(max(0, steps - 1), generator=generator)
        by_step = grouped.view(steps, self.step_size)
        yield from torch.cat([by_step[:1].flatten(), by_step[others].flatten(), self._longest_first(rest)]).tolist()

    def _longest_first(self, rows: Tensor) -> Tensor:
        return rows[self.lengths[rows].argsort(descending=True, stable=True)]


class ExactOrderMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it gives every rank the same order, and each epoch its own.

    Args:
        train_sampler: The order of the training rows, in the place of `train_sampling_strategy`: a `Sampler` of row
            numbers whose order is the same on every rank, such as `ClassBalancedOrder`, or `TokenBudgetBatches`. With a
            method `set_epoch` it is told every epoch. Everything else goes to the `Trainer`.

    Raises:
        ValueError: A strategy is named too, or the rows cannot be drawn by number.
    """

    def __init__(self, *args: Any, train_sampler: Sampler[Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._train_sampler = train_sampler
        if train_sampler is None:
            return
        if self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampler and train_sampling_strategy={self.args.train_sampling_strategy!r} both give the order of "
                "the rows: choose one."
            )
        if not has_length(self.train_dataset):
            raise ValueError("train_sampler draws rows by number, and the training dataset is a stream.")
        made_for = getattr(train_sampler, "dataset_rows", None)
        if made_for not in (None, len(self.train_dataset)):
            raise ValueError(
                f"train_sampler is a {type(train_sampler).__name__} of {made_for} rows, and the training dataset has "
                f"{len(self.train_dataset)}: make it of this dataset."
            )
        if isinstance(train_sampler, TokenBudgetBatches) and any(
            getattr(self.args.accelerator_config, name) for name in ("split_batches", "dispatch_batches")
        ):
            raise ValueError(
                "TokenBudgetBatches deals out whole batches: leave split_batches and dispatch_batches out."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(self._train_sampler, TokenBudgetBatches):
            if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
                raise ValueError(
                    "TokenBudgetBatches gives each rank rows of its own, and some ranks share theirs here."
                )
            self._train_sampler.deal(
                ranks=self.args.world_size,
                rank=self.args.process_index,
                accumulation=self.args.gradient_accumulation_steps,
            )
        if self._train_sampler is not None:
            return self._train_sampler
        seed = self.accelerator.dataloader_config.data_seed = self._data_seed()  # else that of torch at this moment
        if self.args.train_sampling_strategy == "group_by_length" and has_length(dataset):
            return LengthGroupedOrder(self._row_lengths(dataset), self._rows_of_a_step(), seed=seed)
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            _refuse_repeated_rows(sampler)
            sampler.seed = seed  # stock, it is 42 whatever the arguments say
        return sampler

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """accelerate tells a sampler the epoch, but not always: below the loader of a resumed epoch it loses some."""
        tell_epoch(train_dataloader, epoch)
        shared = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        seed_data(train_dataloader, seed=self._data_seed(), epoch=epoch, rank=self.args.process_index // shared)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _row_lengths(self, dataset: Any) -> Tensor:
        if len(dataset) == 0:
            return torch.empty(0)
        column = self.args.length_column_name
        for source in (dataset, self.train_dataset):  # the first has lost the columns that the model does not take
            if isinstance(source, Dataset) and column in source.column_names and len(source) == len(dataset):
                return read_numbers(source, column)
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        return measure_rows(dataset, names[0])

    def _rows_of_a_step(self) -> int:
        if cast(Any, self.args.accelerator_config).split_batches:  # the batch size is that of all ranks together
            return self._train_batch_size * self.args.gradient_accumulation_steps
        return self.get_total_train_batch_size(self.args)


def tell_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of every sampler and batch sampler that `loader` draws from, however deep it lies."""
    layer = getattr(loader, "batch_sampler", None)
    while layer is not None:
        for sampler in (layer, getattr(layer, "sampler", None)):
            if (set_epoch := getattr(sampler, "set_epoch", None)) is not None:
                set_epoch(epoch)
        layer = getattr(layer, "batch_sampler", None)


def measure_rows(dataset: Any, column: str) -> Tensor:
    """The number of entries that `column` has in each row: shape (rows,), int64.

    Raises:
        ValueError: The rows have no such column, or nothing in it.
    """
    first = dataset[0]
    if not isinstance(first, Mapping) or column not in first:
        found = f"has {', '.join(map(str, first))}" if isinstance(first, Mapping) else f"is a {type(first).__name__}"
        raise ValueError(
            f"train_sampling_strategy='group_by_length' goes by the length of {column!r}, and the first row {found}. Give "
            "the dataset (a datasets.Dataset) a column with the length of each row and name it in length_column_name."
        )
    if isinstance(dataset, Dataset) and holds_lists(dataset, column):
        return _read(dataset, column, pc.list_value_length)
    return torch.tensor([len(dataset[i][column]) for i in range(len(dataset))])


def read_numbers(dataset: Dataset, column: str) -> Tensor:
    """A column of numbers: shape (rows,).

    Raises:
        ValueError: It holds something else, or nothing in some row.
    """
    kind = dataset.data.schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"length_column_name={column!r} must be a column of one number a row; it holds {kind}.")
    return _read(dataset, column, lambda values: values)


def _read(dataset: Dataset, column: str, convert: Any) -> Tensor:
    """What `convert` makes of the column, in one pass, with a part of it in memory at a time."""
    parts = dataset.select_columns(column).with_format("arrow").iter(10_000)
    values = pa.chunked_array([chunk for part in parts for chunk in convert(part[column]).chunks])
    if values.null_count:
        raise ValueError(f"column {column!r} is empty in {values.null_count} rows, which so have no length.")
    return torch.tensor(values.to_numpy())


def holds_lists(dataset: Dataset, column: str) -> bool:
    """Whether the rows are what the table says, not what a transform makes of it, and the table says lists."""
    if dataset.format["type"] == "custom" or column not in dataset.data.column_names:
        return False
    kind = dataset.data.schema.field(column).type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _refuse_repeated_rows(sampler: BatchRebalanceSampler) -> None:
    """It gives every micro-batch of an epoch's last step a row, if need be one of the epoch's first."""
    micro_batches = sampler.dp_size * sampler.grad_accum
    if sampler.has_tail and sampler.remainder < micro_batches:
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' would train rows twice: the last step of an epoch has "
            f"{sampler.remainder} rows for {micro_batches} micro-batches (ranks x accumulation: {sampler.dp_size} x "
            f"{sampler.grad_accum}). Drop that step (dataloader_drop_last=True), choose a batch size that leaves none or "
            "more rows, or use train_sampling_strategy='group_by_length'."
        )
