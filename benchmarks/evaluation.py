"""What an evaluation costs beside the stock `Trainer`'s: of a real corpus, and where its logits outweigh the model.

    python benchmarks/evaluation.py mrpc --dataset FOLDER --model CHECKPOINT [--batch-size 8] [--bf16]
    python benchmarks/evaluation.py tokens

`mrpc` evaluates the validation split of a folder that holds MRPC (by default `TRAINER_EXT_MRPC_DIR`): the stock class,
ours, and ours with `sort_eval_by_length`. The record says what each arm finds, so that what precision and sorting
change can be read off. `tokens` evaluates a tiny token classifier of `CLASSES` classes, whose logits are what is moved;
the record has each arm's peak memory on top of the model and data, in a process of its own.

Prints a Markdown table and writes `benchmarks/results/evaluation_NAME.json`.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers import logging as transformers_logging

sys.path.append(str(Path(__file__).parent))

from pairs import measure, write

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.metrics import compute_metrics
from trainer_ext.task import TaskArguments, prepare_task

CLASSES, ROWS, LENGTH = 2000, 256, 64
STOCK = (Trainer, TrainingArguments, {})
OURS = (CustomTrainer, CustomTrainingArguments, {})
SORTED = (CustomTrainer, CustomTrainingArguments, {"sort_eval_by_length": True})


def trainer(kind: Any, folder: str, model: Any, data: Dataset, collator: Any, classes: int, **options: Any) -> Trainer:
    """A trainer of one kind, that has accuracy and F1 computed."""
    made, arguments, own = kind
    args = arguments(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
        **own,
    )
    found = made(
        model=model, args=args, eval_dataset=data, data_collator=collator, compute_metrics=compute_metrics(classes)
    )
    found.remove_callback(PrinterCallback)
    return found


def seconds(evaluated: Trainer, found: dict[str, float]) -> dict[str, float]:
    """Of one evaluation, whose metrics go to `found`."""
    start = time.process_time(), time.perf_counter()
    metrics = evaluated.evaluate()
    end = time.process_time(), time.perf_counter()
    found |= {name: metrics[f"eval_{name}"] for name in ("loss", "accuracy", "f1")}
    return {"cpu": end[0] - start[0], "wall": end[1] - start[1]}


def compare(name: str, trainers: dict[str, Trainer], rounds: int, about: dict[str, Any]) -> None:
    """Measure the trainers' evaluations in turns, and write the record."""
    found: dict[str, dict[str, float]] = {arm: {} for arm in trainers}
    arms: dict[str, Callable[[], Any]] = {arm: partial(seconds, each, found[arm]) for arm, each in trainers.items()}
    record = measure(arms, base="stock Trainer", rounds=rounds, about=about)
    record["about"]["metrics"] = found
    write(record, f"evaluation_{name}")


def mrpc(folder: str, words: argparse.Namespace) -> None:
    task = prepare_task(TaskArguments(dataset=words.dataset, model=words.model))
    model, dtype = task.new_model(0), "bfloat16" if words.bf16 else "float32"
    assert task.validation is not None
    of = {"bf16": words.bf16, "per_device_eval_batch_size": words.batch_size}
    arms = {"stock Trainer": STOCK, "CustomTrainer": OURS, "CustomTrainer, sorted": SORTED}
    trainers = {
        arm: trainer(kind, folder, model, task.validation, task.collator, 2, **of) for arm, kind in arms.items()
    }
    about = {
        "rows": len(task.validation),
        "batch": words.batch_size,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    compare(f"mrpc_{dtype}_{words.batch_size}", trainers, words.rounds, about)


def tokens(folder: str, words: argparse.Namespace) -> None:
    arms = {"stock Trainer": STOCK, "CustomTrainer": OURS}
    context = multiprocessing.get_context("spawn")
    memory = {}
    for arm, kind in arms.items():
        with context.Pool(1) as pool:
            memory[arm] = pool.apply(peak_memory, (kind, folder))
    trainers = {arm: token_trainer(kind, folder) for arm, kind in arms.items()}
    about = {"rows": ROWS, "tokens a row": LENGTH, "classes": CLASSES, "batch": 8, "megabytes": memory}
    compare("tokens", trainers, words.rounds, about)


def token_trainer(kind: Any, folder: str) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=100, max_position_embeddings=LENGTH, num_labels=CLASSES, **sizes)
    ids = torch.randint(5, 100, (ROWS, LENGTH))
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    labels = torch.randint(0, CLASSES, (ROWS, LENGTH)).tolist()
    data = Dataset.from_dict({**rows, "labels": labels})
    model = BertForTokenClassification(config)
    return trainer(kind, folder, model, data, default_data_collator, CLASSES, per_device_eval_batch_size=8)


def peak_memory(kind: Any, folder: str) -> float:
    """Megabytes that an evaluation adds to the process's peak, after one of a few rows."""
    transformers_logging.set_verbosity_error()
    made = token_trainer(kind, folder)
    data = made.eval_dataset
    made.evaluate(data.select(range(8)))  # type: ignore[union-attr]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made.evaluate()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mrpc", "tokens"])
    parser.add_argument("--dataset", default=os.environ.get("TRAINER_EXT_MRPC_DIR"))
    parser.add_argument("--model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    words = parser.parse_args()
    if words.what == "mrpc" and None in (words.dataset, words.model):
        parser.error("mrpc needs --dataset FOLDER (or TRAINER_EXT_MRPC_DIR) and --model CHECKPOINT")
    transformers_logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        (mrpc if words.what == "mrpc" else tokens)(folder, words)


if __name__ == "__main__":
    main()
