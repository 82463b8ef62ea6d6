"""The labels of a dataset: read as one column, and checked before anything is trained."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from torch import Tensor

LABEL_COLUMNS = ("labels", "label", "label_ids")  # what transformers' collators take for labels
NO_VALUE = ("na", "n/a", "nan", "null", "none")  # among numbers, these are no class


def label_column(dataset: Any) -> str | None:
    """The name of the column that holds the labels; None where there is none, or where nothing has columns."""
    if not isinstance(dataset, Dataset):
        return None
    return next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)


def has_float_labels(dataset: Any) -> bool:
    """Whether the label column of `dataset` is known to hold floating-point numbers, in lists or alone."""
    name = label_column(dataset)
    feature: Any = dataset.features[name] if name else None
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).startswith("float")


def read_labels(dataset: Any) -> Tensor | None:
    """Every label of `dataset`, flattened to shape (N,); None for a dataset that cannot be read twice.

    A `datasets.Dataset` is read as one column; any other dataset with a length item by item.

    Raises:
        ValueError: A label is missing or no number; the message names the first such row.
    """
    if (name := label_column(dataset)) is not None:
        return column_labels(dataset, name)
    if isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    items = [dataset[i] for i in range(len(dataset))]
    found = [next((item[name] for name in LABEL_COLUMNS if name in item), None) for item in items]
    if any(label is None for label in found):
        return None
    return torch.cat([torch.as_tensor(label).flatten() for label in found])


def column_labels(dataset: Dataset, name: str) -> Tensor:
    """The labels in one column, flattened to shape (N,); integers and booleans as int64.

    Raises:
        ValueError: A label is missing or no number; the message names the first such row.
    """
    if (row := first_missing(dataset, name)) is not None:
        raise ValueError(f"row {row} of the dataset has no value in its label column {name!r}.")
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    while hasattr(column.type, "value_type"):
        column = pc.list_flatten(column)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    elif not pa.types.is_floating(column.type):
        raise ValueError(
            f"the label column {name!r} holds {dataset.features[name]}; labels are whole numbers or texts, all of one kind."
        )
    if column.null_count:
        raise ValueError(f"the dataset has a row with a missing value in its label column {name!r}.")
    return torch.from_numpy(column.to_numpy().copy())


def first_missing(dataset: Dataset, name: str) -> int | None:
    """The first row without a value in column `name`, or None."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    return pc.index(pc.is_null(column), True).as_py() if column.null_count else None


def is_text(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def number_labels(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """Labels as 0..C-1 in every split, and the name of each class.

    Text labels are numbered in sorted order; integers and booleans are taken as they are.

    Raises:
        ValueError: A label is missing, is neither integer nor text, lies outside the classes of the train split, or
            there is one class only; the message names the split, and the first such row.
    """
    for name, split in splits.items():
        if column not in split.column_names:
            raise ValueError(f"its {name} split has no label column {column!r}; it has {split.column_names}.")
        if (row := first_missing(split, column)) is not None:
            raise ValueError(f"its {name} split has no label in {column!r} at row {row}. Write one, or drop the row.")
        if is_text(split.features[column]) != is_text(splits["train"].features[column]):
            kinds = f"{split.features[column]}, and {splits['train'].features[column]} in train"
            raise ValueError(f"its {name} split has labels of another kind in {column!r}: {kinds}.")
    feature = splits["train"].features[column]
    if is_text(feature):
        names = _text_classes(splits, column)
        target = ClassLabel(names=names)
    else:
        names = _integer_classes(splits, column)
        target = feature if isinstance(feature, ClassLabel) else Value("int64")
    numbered = splits.cast_column(column, target)
    present = column_labels(numbered["train"], column).unique().tolist()
    if len(present) < 2:
        raise ValueError(f"every label of its train split is {names[present[0]]!r}: there is nothing to classify.")
    return numbered, names


def _text_classes(splits: DatasetDict, column: str) -> list[str]:
    labels = {name: split[column][:] for name, split in splits.items()}
    names = sorted(set(labels["train"]))
    numbers = any(name.strip().lstrip("-").isdigit() for name in names)
    known = set(names)
    for split, values in labels.items():
        for row, value in enumerate(values):
            if not value.strip() or (numbers and value.strip().lower() in NO_VALUE):
                raise ValueError(f"its {split} split has no label at row {row}, but {value!r}. Mend or drop the row.")
            if value not in known:
                raise ValueError(f"its {split} split has the label {value!r} at row {row}, which train does not have.")
    return names


def _integer_classes(splits: DatasetDict, column: str) -> list[str]:
    feature = splits["train"].features[column]
    labels = {name: column_labels(split, column) for name, split in splits.items()}
    for split, values in labels.items():
        kind = splits[split].features[column]
        if values.is_floating_point() or not isinstance(kind, Value | ClassLabel):
            raise ValueError(
                f"the labels in {column!r} of its {split} split are {kind}; a class is an integer or text. Write "
                "0, 1, .. or names."
            )
    classes = sorted(set(labels["train"].tolist()))
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif feature.dtype == "bool":
        names = ["False", "True"]
    else:
        names = [str(value) for value in range(len(classes))]
    if len(classes) == 1:
        only = names[classes[0]] if classes[0] in range(len(names)) else str(classes[0])
        raise ValueError(f"every label of its train split is {only!r}: there is nothing to classify.")
    for split, values in labels.items():
        outside = ((values < 0) | (values >= len(names))).nonzero()
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"its {split} split has the label {int(values[row])} at row {row}, outside 0..{len(names) - 1}: train has "
                f"the labels {classes[:10]}, and C classes are numbered 0..C-1, none left out. Mend the label, or "
                "renumber the classes."
            )
    return names


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
            f"{origin}: the labels are {labels.dtype}, and a loss or weight by class needs integers. Heads of several "
            "labels take loss='bce', regression loss='mse', and each its own loss, loss='model'."
        )
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if outside.any():
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{origin}: label {int(labels.flatten()[row])} at row {row} is outside 0..{num_labels - 1}, the model's "
            f"{num_labels} labels. Mend the data, or load the model with the right num_labels."
        )
