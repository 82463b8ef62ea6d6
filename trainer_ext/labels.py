"""The labels of a dataset: read as one column, and checked before anything is trained."""

from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

LABEL_COLUMNS = ("labels", "label", "label_ids")  # what transformers' collators take for labels


def label_column(dataset: Any) -> str | None:
    """The name of the column that holds the labels; None where there is none, or where nothing has columns."""
    if not isinstance(dataset, Dataset):
        return None
    return next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)


def read_labels(dataset: Any) -> Tensor | None:
    """Every label of `dataset`, flattened to shape (N,); None for a dataset that cannot be read twice.

    A `datasets.Dataset` is read as one column; any other dataset with a length item by item.

    Raises:
        ValueError: A label is missing; the message names the first such row.
    """
    if (name := label_column(dataset)) is not None:
        column = dataset.select_columns(name).with_format("arrow")[:][name]
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise ValueError(f"row {row} of the dataset has no value in its label column {name!r}.")
        while hasattr(column.type, "value_type"):
            column = pc.list_flatten(column)
        return torch.from_numpy(column.to_numpy().copy())
    if isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    items = [dataset[i] for i in range(len(dataset))]
    found = [next((item[name] for name in LABEL_COLUMNS if name in item), None) for item in items]
    if any(label is None for label in found):
        return None
    return torch.cat([torch.as_tensor(label).flatten() for label in found])


def check_class_labels(labels: Tensor, num_labels: int, origin: str, ignore_index: int = -100) -> None:
    """Hold `labels` to what a classification loss over `num_labels` classes can take.

    Args:
        labels: Any shape.
        num_labels: The number of classes, C.
        origin: Where the labels come from, for the message.
        ignore_index: A label that is allowed besides, and does not count.

    Raises:
        ValueError: A label is not an integer, or lies outside 0..C-1; the message names the first.
    """
    if labels.is_floating_point():
        raise ValueError(
            f"{origin}: the labels are {labels.dtype}, and a classification loss needs integers. For regression or "
            "multi-label heads use loss='model'."
        )
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if outside.any():
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{origin}: label {int(labels.flatten()[row])} at row {row} is outside 0..{num_labels - 1}, the model's "
            f"{num_labels} labels. Mend the data, or load the model with the right num_labels."
        )
