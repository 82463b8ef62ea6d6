"""What is trained on what: splits, tokenizer, collator and model, ready for `CustomTrainer` or a loop."""

import difflib
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, HfArgumentParser
from transformers.hf_argparser import string_to_bool

from trainer_ext.arguments import CustomTrainingArguments
from trainer_ext.data import default_dataset, load_splits, tokenize
from trainer_ext.fast import PROFILES
from trainer_ext.labels import read_labels
from trainer_ext.losses import class_weights
from trainer_ext.models import TINY, TINY_TRAINING, default_model, load_model, load_tokenizer
from trainer_ext.plain_text import masked, printable


@dataclass
class TaskArguments:
    """The data and the model of a text classification, for `HfArgumentParser`."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`sample` (built in, offline); a hub name such as glue/mrpc; a file (.jsonl, .json, .csv, .tsv, "
            ".parquet); or a folder with train.* and validation.*. Default: glue/mrpc, or the sample when no hub can be "
            "reached."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "A hub name, a checkpoint folder, or `tiny` (a small untrained BERT, offline). Default: tiny on the "
            "sample, else bert-base-uncased."
        },
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The one or two text columns, where their names are not the usual ones."}
    )
    label_column: str | None = field(default=None, metadata={"help": "The label column. Default: label or labels."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are truncated, in tokens."})
    token_cache: bool = field(
        default=True, metadata={"help": "Read the token ids from the disk where the same rows were tokenised before."}
    )
    profile: str | None = field(
        default=None,
        metadata={
            "help": "`fast`: defaults for speed on this machine; each of them can be set by its own option.",
            "choices": list(PROFILES),
        },
    )


@dataclass(frozen=True)
class Task:
    """A text classification, ready to train.

    Attributes:
        dataset: Where the data came from.
        model: The name or path of the checkpoint.
        train: Tokenised rows with `labels`.
        validation: The same, or None where the source has no such split.
        tokenizer: The model's.
        collator: Pads a batch to its longest row.
        label_names: The classes, in the order of their labels.
    """

    dataset: str
    model: str
    train: Dataset
    validation: Dataset | None
    tokenizer: Any
    collator: Callable[[list[Any]], Any]
    label_names: list[str]

    def new_model(self, seed: int, *, dtype: torch.dtype = torch.float32, dropout: bool = True) -> Any:
        """The model as training starts from it; equal for equal seeds.

        Raises:
            ValueError: The model cannot be loaded, or reads fewer tokens than the longest row has.
        """
        model = load_model(self.model, self.label_names, seed=seed, dtype=dtype, dropout=dropout)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        longest = max(_longest(split) for split in (self.train, self.validation) if split is not None)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"model {self.model!r} reads {positions} tokens, and dataset {self.dataset!r} has a row of {longest}. "
                f"Cut the texts: --max-length {positions}."
            )
        return model

    def class_weights(self, spec: Any) -> Tensor | None:
        """The class weights that `spec` (as `CustomTrainingArguments.class_weights`) means on this task."""
        if spec is None:
            return None
        label2id = {name: i for i, name in enumerate(self.label_names)}
        return class_weights(spec, len(self.label_names), labels=read_labels(self.train), label2id=label2id)


def _longest(split: Dataset) -> int:
    ids = split.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return pc.max(pc.list_value_length(ids)).as_py()


def prepare_task(arguments: TaskArguments) -> Task:
    """Load and tokenise what `arguments` name.

    Raises:
        ValueError: The data or the model is not what is needed; see `load_splits` and `load_model`.
        ConnectionError: Something has to come from a hub that does not answer.
    """
    dataset = default_dataset() if arguments.dataset is None else arguments.dataset
    data = load_splits(dataset, text_columns=arguments.text_columns, label_column=arguments.label_column)
    model = default_model(dataset) if arguments.model is None else arguments.model
    tokenizer = load_tokenizer(model)
    encoded = tokenize(data, tokenizer, max_length=arguments.max_length, cache=arguments.token_cache)
    return Task(
        dataset=data.name,
        model=model,
        train=encoded["train"],
        validation=encoded.get("validation"),
        tokenizer=tokenizer,
        collator=DataCollatorWithPadding(tokenizer),
        label_names=data.label_names,
    )


class TaskParser(HfArgumentParser):
    """An `HfArgumentParser` over `TaskArguments` and `CustomTrainingArguments`.

    The tiny BERT starts from random weights: where it is what gets trained, its own learning rate and epochs are the
    defaults. So are those of a profile, and a value on the command line wins as always. A mistake is one line and exit
    code 2.
    """

    def __init__(self, **kwargs: Any) -> None:
        classes: Any = (TaskArguments, CustomTrainingArguments)
        super().__init__(classes, allow_abbrev=False, **kwargs)

    def parse(self, argv: list[str] | None = None) -> tuple[TaskArguments, CustomTrainingArguments]:
        """The two dataclasses; the dataset and the model are named in the first, whatever was left out."""
        names = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        names.add_argument("--dataset")
        names.add_argument("--model")
        names.add_argument("--profile", choices=PROFILES)
        names.add_argument("--use_cpu", "--use-cpu", type=string_to_bool, nargs="?", const=True)
        try:
            given, _ = names.parse_known_args(argv)
        except ArgumentError as error:
            self.error(str(error))
        dataset = default_dataset() if given.dataset is None else given.dataset
        model = default_model(dataset) if given.model is None else given.model
        self.set_defaults(dataset=dataset, model=model, **(TINY_TRAINING if model == TINY else {}))
        if given.profile is not None:
            self.set_defaults(**PROFILES[given.profile](use_cpu=bool(given.use_cpu)))
        known, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"{unknown[0]} is not an option{self._nearest(unknown[0])}")
        try:
            task_arguments, args = self.parse_dict(vars(known))
        except (ValueError, OSError) as error:
            self.error(" ".join(str(error).split()))
        return task_arguments, args

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the list of every training argument."""
        self.exit(2, f"{self.prog}: error: {printable(masked(message))}\n")

    def _nearest(self, option: str) -> str:
        near = difflib.get_close_matches(option.split("=")[0], self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""
