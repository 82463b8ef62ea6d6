"""From a dataset's name to tokenised splits.

Three sources behind one call: a dataset of the hub, local files, and the built-in sample. Whatever the source,
rows come out as one or two text columns and an integer label, and a problem is an error before any training.
"""

import logging
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from trainer_ext.labels import LABEL_COLUMNS, check_class_labels, read_labels

logger = logging.getLogger(__name__)

SAMPLE = "sample"
HUB_DEFAULT = "glue/mrpc"
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = (  # what the common corpora call their texts, in the order in which the model reads them
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)


@dataclass(frozen=True)
class Splits:
    """A dataset's splits, with rows as text and an integer label.

    Attributes:
        name: Where they come from: `sample`, a hub name or a path.
        splits: `train`, and `validation` and `test` where the source has them.
        text_columns: One or two columns, in the order in which the model reads them.
        label_column: The column of integer labels.
        label_names: The name of each class, in the order of the labels.
    """

    name: str
    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_column: str
    label_names: list[str]


def load_splits(dataset: str, *, text_columns: list[str] | None = None, label_column: str | None = None) -> Splits:
    """The splits of `dataset`, checked.

    Args:
        dataset: `sample`; a hub name, with a configuration after a slash (`glue/mrpc`, `owner/name`,
            `owner/name/config`); a file (.jsonl, .json, .csv, .tsv, .parquet), or a folder that holds `train.*`,
            `validation.*` and `test.*`.
        text_columns: The one or two columns to read; by default the usual names are looked for.
        label_column: The column of labels; by default `label` or `labels`.

    Raises:
        ValueError: There is no such dataset, a file is not what its name says, a column is missing, or a label is
            missing or out of range.
        ConnectionError: A hub dataset was named and the hub does not answer.
    """
    splits = _read(dataset)
    if "train" not in splits:
        raise ValueError(f"dataset {dataset!r} has no train split; it has {', '.join(splits)}.")
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"dataset {dataset!r}: its {name} split is empty.")
    texts = _text_columns(dataset, splits["train"], text_columns)
    label = _label_column(dataset, splits["train"], label_column)
    splits, names = _integer_labels(dataset, splits, label)
    return Splits(dataset, splits, texts, label, names)


def default_dataset() -> str:
    """GLUE MRPC; where no hub can be reached the built-in sample, with one line that says so."""
    if hub_answers():
        return HUB_DEFAULT
    logger.warning("No dataset named and no hub within reach: using the built-in sample.")
    return SAMPLE


def tokenize(data: Splits, tokenizer: Any, *, max_length: int | None = 128) -> DatasetDict:
    """Token ids for every split: columns of the tokenizer, and `labels`; all others are dropped.

    Padding is left to the collator, batch by batch.
    """

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in data.text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    columns = [column for column in data.splits["train"].column_names if column != data.label_column]
    encoded = data.splits.map(encode, batched=True, remove_columns=columns, desc="Tokenising")
    if data.label_column == "labels":
        return encoded
    return encoded.rename_column(data.label_column, "labels")


@cache
def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub can be reached: one connection attempt, once a process (a library's own try takes 25 s)."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((endpoint.hostname, port), timeout).close()
    except OSError:
        return False
    return True


def require_hub(what: str) -> None:
    """Raise where `what` would have to come from a hub that does not answer; with HF_HUB_OFFLINE=1 the cache may serve.

    Raises:
        ConnectionError: With the ways round.
    """
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
        raise ConnectionError(
            f"{what} is no local path, and the hub cannot be reached. Name a local path, use the built-in sample "
            "(--dataset sample), or set HF_HUB_OFFLINE=1 to use what is in the cache."
        )


def _read(dataset: str) -> DatasetDict:
    if dataset == SAMPLE:
        from trainer_ext.sample import sample_rows

        label = ClassLabel(names=["not_equivalent", "equivalent"])
        rows = {name: Dataset.from_list(sample_rows(name)) for name in ("train", "validation")}
        return DatasetDict({name: split.cast_column("label", label) for name, split in rows.items()})
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = {name: _one_file(path, name) for name in SPLITS}
        found = {name: file for name, file in files.items() if file is not None}
        if not found:
            raise ValueError(f"dataset folder {dataset!r} has no train.* of {', '.join(READERS)}.")
        return DatasetDict({name: _read_file(file) for name, file in found.items()})
    if path.is_file():
        return DatasetDict({"train": _read_file(path)})
    if path.suffix in READERS or path.is_absolute() or dataset.startswith("."):
        raise ValueError(f"dataset {dataset!r}: there is no such file or folder.")
    return _read_hub(dataset)


def _one_file(folder: Path, split: str) -> Path | None:
    files = sorted(file for file in folder.glob(f"{split}.*") if file.suffix in READERS)
    if len(files) > 1:
        raise ValueError(f"dataset folder: {', '.join(map(str, files))} are all its {split} split; keep one.")
    return files[0] if files else None


def _read_file(file: Path) -> Dataset:
    reader = READERS.get(file.suffix)
    if reader is None:
        raise ValueError(f"dataset file {str(file)!r}: {file.suffix or 'no suffix'} is none of {', '.join(READERS)}.")
    if file.stat().st_size == 0:
        raise ValueError(f"dataset file {str(file)!r} is empty.")
    options = {"delimiter": "\t"} if file.suffix == ".tsv" else {}
    try:
        return load_dataset(reader, data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError, TypeError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"dataset file {str(file)!r} cannot be read as {file.suffix}: {cause}") from error


def _read_hub(dataset: str) -> DatasetDict:
    require_hub(f"dataset {dataset!r}")
    owner, *rest = dataset.split("/")
    if owner == "glue":  # what everyone types; the hub has it under its owner's name
        repository, config = "nyu-mll/glue", rest
    else:
        repository, config = "/".join([owner, *rest[:1]]), rest[1:]
    try:
        found = load_dataset(repository, *config)
    except (ValueError, OSError) as error:
        raise ValueError(f"dataset {dataset!r} is neither a local path nor readable from the hub: {error}") from error
    return DatasetDict({name: split for name, split in found.items() if name in SPLITS and _has_labels(split)})


def _has_labels(split: Dataset) -> bool:
    """GLUE hides the labels of its test splits behind -1."""
    return "label" not in split.column_names or set(split.unique("label")) != {-1}


def _text_columns(dataset: str, train: Dataset, asked: list[str] | None) -> tuple[str, ...]:
    strings = [name for name, feature in train.features.items() if getattr(feature, "dtype", "") in STRINGS]
    if asked:
        absent = [name for name in asked if name not in strings]
        if absent or len(asked) > 2:
            raise ValueError(
                f"dataset {dataset!r}: text columns {asked} must be one or two of its text columns, {strings}."
            )
        return tuple(asked)
    for usual in TEXT_COLUMNS:
        if all(name in strings for name in usual):
            return usual
    candidates = tuple(name for name in strings if name not in LABEL_COLUMNS)
    if len(candidates) in (1, 2):
        return candidates
    raise ValueError(
        f"dataset {dataset!r}: which columns are the text? It has {train.column_names}; name one or two of them "
        "(--text-columns)."
    )


STRINGS = ("string", "large_string", "string_view")


def _label_column(dataset: str, train: Dataset, asked: str | None) -> str:
    usual = [asked] if asked else list(LABEL_COLUMNS)
    found = next((name for name in usual if name in train.column_names), None)
    if found is None:
        raise ValueError(
            f"dataset {dataset!r} has no label column: looked for {', '.join(usual)} among {train.column_names}. Name "
            "it (--label-column)."
        )
    return found


def _integer_labels(dataset: str, splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """Labels as 0..C-1 in every split, and their names; text labels are numbered in sorted order."""
    for name, split in splits.items():
        if column not in split.column_names:
            raise ValueError(f"dataset {dataset!r}: its {name} split has no label column {column!r}.")
    feature = splits["train"].features[column]
    if getattr(feature, "dtype", "") in STRINGS:
        names = sorted(set(splits["train"][column]) - {None})
        for split_name, split in splits.items():
            unknown = next((label for label in split[column] if label not in names), None)
            if any(label not in names for label in split[column]):
                raise ValueError(
                    f"dataset {dataset!r}: the {split_name} split has the label {unknown!r}, not in train."
                )
        return splits.cast_column(column, ClassLabel(names=names)), names
    try:
        labels = {
            name: read_labels(split.select_columns(column).rename_column(column, "labels"))
            for name, split in splits.items()
        }
    except ValueError as error:
        raise ValueError(f"dataset {dataset!r}: {error}") from error
    train = labels["train"]
    assert train is not None
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif train.is_floating_point():
        raise ValueError(
            f"dataset {dataset!r}: its labels in {column!r} are {feature.dtype}; this command trains classifiers, whose "
            "labels are integers or text."
        )
    else:
        present = sorted(set(train.tolist()))
        gap = next((value for place, value in enumerate(present) if place != value), None)
        if gap is not None:
            raise ValueError(
                f"dataset {dataset!r}: its train split has the label {gap}, and labels must be 0..C-1 with none left "
                f"out; it has {present[:10]}. Mend the label {gap}, or renumber the classes."
            )
        names = [str(value) for value in present]
    for name, values in labels.items():
        assert values is not None
        check_class_labels(values, len(names), f"dataset {dataset!r}, {name} split")
    if len(names) < 2:
        raise ValueError(f"dataset {dataset!r} has one label only, {names}: there is nothing to classify.")
    return splits.cast_column(column, feature if isinstance(feature, ClassLabel) else Value("int64")), names
