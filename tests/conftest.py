"""What every test needs: no hub, one thread, the environment's own tools, a classifier and rows made in a moment."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The launchers are this environment's, whether or not it is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, default_data_collator
from typer.testing import CliRunner

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.cli import app

LONGEST = (
    "test_readme.py",
    "parity/test_launched_modes.py",
    "rehearsal/test_rehearse.py",
    "test_launches.py",
    "callbacks/test_stop_on_signal.py",
    "parity/test_records_of_scripts.py",
    "test_lost_ranks.py",
    "test_examples.py",
    "optim/test_engines.py",
    "callbacks/test_non_finite_guard.py",
    "distributed/test_two_hosts.py",
)
VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def pytest_collection_modifyitems(items):
    """The longest files first: a file is run by one worker, and one that begins late has the others wait for it."""
    folder = Path(__file__).parent
    places = {(folder / name).resolve(strict=True): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def tiny_model(seed=0, *, num_labels=2, dropout=0.1, dtype=torch.float32, tokens=False, **config):
    """A BERT classifier of sequences or tokens that trains in milliseconds."""
    torch.manual_seed(seed)
    head = BertForTokenClassification if tokens else BertForSequenceClassification
    made = head(
        BertConfig(
            **SIZES,
            num_labels=num_labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **config,
        )
    )
    return made.to(dtype)


def rows(count=22, *, num_labels=2, tokens=False, seed=1):
    """Rows of eight tokens whose classes are unbalanced, so that micro-batches differ in their weight."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (count, 8), generator=generator)
    shape = (count, 8) if tokens else (count,)
    labels = (torch.rand(shape, generator=generator) ** 2 * num_labels).long()
    if tokens:
        labels[torch.rand(shape, generator=generator) < 0.3] = -100
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


@pytest.fixture
def arguments(tmp_path):
    """Training arguments that log every step and write nothing besides."""

    def make(cls=CustomTrainingArguments, **options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            "log_level": "error",
        }
        return cls(**{**defaults, **options})

    return make


@pytest.fixture
def trainer(arguments):
    """A CustomTrainer (or another class) on the rows above."""

    def make(cls=CustomTrainer, *, model=None, train=None, evaluation=None, args=None, **options):
        arguments_class = options.pop("arguments_class", CustomTrainingArguments)
        own = {name: options.pop(name) for name in list(options) if name in TRAINER_OPTIONS}
        if "model_init" not in own:
            own["model"] = model if model is not None else tiny_model()
        return cls(
            args=args or arguments(arguments_class, **options),
            train_dataset=train if train is not None else rows(),
            eval_dataset=evaluation,
            **{"data_collator": default_data_collator, **own},
        )

    return make


@pytest.fixture
def call():
    """The command, in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


TRAINER_OPTIONS = (
    "callbacks",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "model_init",
    "optimizer_cls_and_kwargs",
    "optimizers",
    "processing_class",
    "train_sampler",
)


def logged(trainer, name="loss"):
    """The values that the trainer logged under `name`, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
