"""From a dataset's name to tokenised splits.

Three sources behind one call: a dataset of the hub, local files, and the built-in sample. Whatever the source,
rows come out as one or two text columns and an integer label, and a problem is an error before any training.
"""

import codecs
import csv
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from trainer_ext.hub import hub_answers, require_hub
from trainer_ext.labels import LABEL_COLUMNS, first_missing, is_text, label_column, number_labels
from trainer_ext.token_cache import definition_of, digest_file, tokenize_once

logger = logging.getLogger(__name__)

SAMPLE = "sample"
HUB_DEFAULT = "glue/mrpc"
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
READER_OPTIONS: dict[str, dict[str, Any]] = {  # only an empty cell is a missing value: "None" and "NA" are words
    ".csv": {"keep_default_na": False, "na_values": [""]},
    ".tsv": {"keep_default_na": False, "na_values": [""], "delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
NULL_ROW = re.compile(rb"(^|[}\]]|\xef\xbb\xbf)\s*null\b")
HINTS = "This happened while"  # from here on a reader of `datasets` tells what its own errors are about
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0", "No columns to parse")  # what readers say
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
            `validation.*` and `test.*`. A .tsv has one row a line, and quotation marks are text in it.
        text_columns: The one or two columns to read; by default the usual names are looked for.
        label_column: The column of labels; by default `label` or `labels`.

    Raises:
        ValueError: There is no such dataset, a file is not what its name says, a column is missing, a text is
            missing, or a label is missing or out of range.
        ConnectionError: A hub dataset was named and the hub does not answer.
    """
    splits = _read(dataset)
    try:
        return Splits(dataset, *_checked(splits, text_columns, label_column))
    except ValueError as error:
        raise ValueError(f"dataset {dataset!r}: {error}") from error


def default_dataset() -> str:
    """GLUE MRPC; where no hub can be reached the built-in sample, with one line that says so."""
    if hub_answers():
        return HUB_DEFAULT
    logger.warning("No dataset named and no hub within reach: using the built-in sample.")
    return SAMPLE


def tokenize(data: Splits, tokenizer: Any, *, max_length: int | None = 128, cache: bool = True) -> DatasetDict:
    """Token ids for every split: columns of the tokenizer, and `labels`; all others are dropped.

    Padding is left to the collator, batch by batch. Texts are cut at `max_length` tokens, and at what the model reads.
    With `cache` they are read from the disk where the same rows were tokenised before (`trainer_ext.token_cache`).

    Raises:
        ValueError: `max_length` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(data.text_columns) == 2)
    if max_length is not None and max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: {special} tokens of every row are special. Raise it."
        )
    if max_length is not None and max_length > tokenizer.model_max_length:
        logger.warning("max_length=%d: the model reads %d tokens.", max_length, tokenizer.model_max_length)
        max_length = tokenizer.model_max_length

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in data.text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    columns = [column for column in data.splits["train"].column_names if column != data.label_column]
    definition = definition_of(tokenizer, max_length) if cache else None
    if definition is None:
        encoded = data.splits.map(encode, batched=True, remove_columns=columns, desc="Tokenising")
    else:
        used = [*data.text_columns, data.label_column]
        encoded = DatasetDict(
            {name: tokenize_once(split, encode, used, definition, drop=columns) for name, split in data.splits.items()}
        )
    if data.label_column == "labels":
        return encoded
    return encoded.rename_column(data.label_column, "labels")


def _read(dataset: str) -> DatasetDict:
    if dataset == SAMPLE:
        from trainer_ext.sample import sample_rows

        label = ClassLabel(names=["not_equivalent", "equivalent"])
        rows = {name: Dataset.from_list(sample_rows(name)) for name in ("train", "validation")}
        return DatasetDict({name: split.cast_column("label", label) for name, split in rows.items()})
    if not dataset.strip():
        raise ValueError(f"dataset {dataset!r}: the name is empty.")
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = {name: _one_file(path, name) for name in SPLITS}
        found = {name: file for name, file in files.items() if file is not None}
        if not found:
            raise ValueError(f"dataset folder {dataset!r} has no train.* of {', '.join(READERS)}.")
        return DatasetDict({name: _read_file(file) for name, file in found.items()})
    if path.is_file():
        return DatasetDict({"train": _read_file(path)})
    if path.suffix.lower() in READERS or path.is_absolute() or dataset.startswith("."):
        raise ValueError(f"dataset {dataset!r}: there is no such file or folder.")
    return _read_hub(dataset)


def _one_file(folder: Path, split: str) -> Path | None:
    files = sorted(file for file in folder.glob(f"{split}.*") if file.suffix.lower() in READERS)
    if len(files) > 1:
        raise ValueError(f"dataset folder: {', '.join(map(str, files))} are all its {split} split; keep one.")
    return files[0] if files else None


def _read_file(file: Path) -> Dataset:
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"dataset file {str(file)!r}: its name must end in one of {', '.join(READERS)}.")
    options = READER_OPTIONS.get(suffix, {})
    try:
        if file.stat().st_size:
            if READERS[suffix] == "json":
                _refuse_null_rows(file)
            if READERS[suffix] == "csv":
                _check_header(file, options.get("delimiter", ","), options.get("quoting", csv.QUOTE_MINIMAL))
            content = digest_file(file)  # `datasets` knows a file by its time stamp alone
            return load_dataset(READERS[suffix], content, data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError, TypeError, RecursionError) as error:
        cause = str(error.__cause__ or error).partition(HINTS)[0].strip()
        if not any(words in cause for words in NO_ROWS):
            problem = f"cannot be read as {suffix}: {cause.rstrip('.')}"
            raise ValueError(f"dataset file {str(file)!r} {problem}. Mend it, or name it for what it is.") from error
    raise ValueError(f"dataset file {str(file)!r} has no rows.")


def _refuse_null_rows(file: Path) -> None:
    """A row that is null ends the whole process inside of pyarrow, with a segmentation fault."""
    with file.open("rb") as lines:
        first = next(lines, b"")
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            whole = first + lines.read()
            if b"null" in whole and None in json.loads(whole):
                raise ValueError("a row of it is null")
            return
        for number, line in enumerate(chain([first], lines), 1):
            if NULL_ROW.search(line) and None in _values(line.decode("utf-8-sig")):
                raise ValueError(f"line {number} is null, and no row")


def _values(line: str) -> Iterator[Any]:
    """The JSON values that stand on a line, behind one another."""
    decoder, at = json.JSONDecoder(), 0
    while line[at:].strip():
        at += len(line[at:]) - len(line[at:].lstrip())
        value, at = decoder.raw_decode(line, at)
        yield value


def _check_header(file: Path, delimiter: str, quoting: int) -> None:
    """The reader would give the second of two columns of one name another name, and say nothing."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines, delimiter=delimiter, quoting=quoting), [])  # type: ignore[arg-type]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"column {twice[0]!r} is there {names.count(twice[0])} times")


def _read_hub(dataset: str) -> DatasetDict:
    owner, *rest = dataset.split("/")
    if owner == "glue":  # what everyone types; the hub has it under its owner's name
        repository, config = "nyu-mll/glue", rest
    else:
        repository, config = "/".join([owner, *rest[:1]]), rest[1:]
    if len(config) > 1 or not all([owner, *rest]):
        raise ValueError(f"dataset {dataset!r}: there is no such file or folder, and it is no hub name.")
    require_hub(f"dataset {dataset!r}")
    try:
        found = load_dataset(repository, *config)
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"dataset {dataset!r} is neither a local path nor readable from the hub: {cause}") from error
    splits = {name: split for name, split in found.items() if name in SPLITS and _has_labels(split)}
    if "validation" not in splits:
        logger.warning("dataset %r: no validation split among %s; nothing to evaluate on.", dataset, ", ".join(found))
    return DatasetDict(splits)


def _has_labels(split: Dataset) -> bool:
    """GLUE hides the labels of its test splits behind -1."""
    column = label_column(split)
    return column is None or set(split.unique(column)) != {-1}


def _checked(
    splits: DatasetDict, text_columns: list[str] | None, label_column: str | None
) -> tuple[DatasetDict, tuple[str, ...], str, list[str]]:
    if "train" not in splits:
        raise ValueError(f"no train split; it has {', '.join(splits) or 'none of ' + ', '.join(SPLITS)}.")
    label = _label_column(splits["train"], label_column)
    texts = _text_columns(splits["train"], text_columns, label)
    for name, split in splits.items():
        _check_texts(split, texts, name)
    splits, names = number_labels(splits, label)
    return splits, texts, label, names


def _label_column(train: Dataset, asked: str | None) -> str:
    usual = [asked] if asked else list(LABEL_COLUMNS)
    found = [name for name in usual if name in train.column_names]
    if len(found) == 1:
        return found[0]
    problem = f"both {' and '.join(found)} could be" if found else f"none of {', '.join(usual)} is there as"
    raise ValueError(f"{problem} the label column, among {train.column_names}. Name it (--label-column).")


def _text_columns(train: Dataset, asked: list[str] | None, label: str) -> tuple[str, ...]:
    strings = [name for name, feature in train.features.items() if is_text(feature) and name != label]
    if asked:
        if len(asked) > 2 or len(set(asked)) < len(asked) or not set(asked) <= set(strings):
            raise ValueError(f"text columns {asked} must be one or two of its text columns, {strings}.")
        return tuple(asked)
    for usual in TEXT_COLUMNS:
        if all(name in strings for name in usual):
            return usual
    if len(strings) == 1:
        return (strings[0],)
    raise ValueError(
        f"which columns are the text? It has {train.column_names}, text in {strings or 'none'}; name one or two of them "
        "(--text-columns)."
    )


def _check_texts(split: Dataset, columns: tuple[str, ...], name: str) -> None:
    if len(split) == 0:
        raise ValueError(f"its {name} split is empty.")
    for column in columns:
        if column not in split.column_names:
            raise ValueError(f"its {name} split has no text column {column!r}; it has {split.column_names}.")
        if (row := first_missing(split, column)) is not None:
            raise ValueError(f"its {name} split has no text in {column!r} at row {row}. Write one, or drop the row.")
        if not is_text(split.features[column]):
            raise ValueError(f"its {name} split holds no text in {column!r}, but {split.features[column]}.")
