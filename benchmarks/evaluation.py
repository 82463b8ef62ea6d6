"""What an evaluation costs beside the stock `Trainer`'s: of a real corpus, and where its logits outweigh the model.

    python benchmarks/evaluation.py mrpc [--dataset FOLDER] [--model CHECKPOINT] [--batch-size 8]
    python benchmarks/evaluation.py tokens

`mrpc` evaluates the validation split of MRPC in float32 and in bfloat16: the stock class, ours, and ours with
`sort_eval_by_length`. The record says what each arm finds, so that what precision and sorting change can be read off;
give a checkpoint that was trained for it (`benchmarks/fast_accuracy.py --keep FOLDER`). `tokens` evaluates a tiny token
classifier of `CLASSES` classes, whose logits are what is moved; the record has the memory that an evaluation adds.

Each arm is a process of its own, which evaluates again and again in turns with the others. Prints a Markdown table and
writes `benchmarks/results/evaluation_NAME.json`.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
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

from mrpc import add_options, check, name_of
from pairs import Seconds, measure, write

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.metrics import compute_metrics
from trainer_ext.task import TaskArguments, prepare_task

CLASSES, ROWS, LENGTH = 2000, 256, 64
SORTED, BF16 = {"sort_eval_by_length": True}, {"bf16": True}
Options = dict[str, Any]
ARMS: dict[str, dict[str, tuple[bool, Options]]] = {  # by question: whether it is ours, and its options
    "mrpc": {
        "Trainer": (False, {}),
        "Trainer, bf16": (False, BF16),
        "CustomTrainer": (True, {}),
        "CustomTrainer, sorted": (True, SORTED),
        "CustomTrainer, sorted, bf16": (True, {**SORTED, **BF16}),
    },
    "tokens": {"Trainer": (False, {}), "CustomTrainer": (True, {})},
}
METRICS = ("loss", "accuracy", "f1")

evaluated: Trainer  # in an arm's process


def begin(words: argparse.Namespace, ours: bool, options: Options) -> None:
    """In a process of its own: make the trainer that is evaluated."""
    global evaluated
    transformers_logging.set_verbosity_error()
    made, arguments = (CustomTrainer, CustomTrainingArguments) if ours else (Trainer, TrainingArguments)
    args = arguments(
        output_dir=mkdtemp(dir=words.scratch),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        per_device_eval_batch_size=words.batch_size,
        **options,
    )
    model, data, collator, classes = {"mrpc": mrpc, "tokens": tokens}[words.what](words)
    metrics = compute_metrics(classes)
    evaluated = made(model=model, args=args, eval_dataset=data, data_collator=collator, compute_metrics=metrics)
    evaluated.remove_callback(PrinterCallback)


def evaluate() -> tuple[Seconds, dict[str, float]]:
    """Evaluate once: what it took, and what was found."""
    start = time.process_time(), time.perf_counter()
    metrics = evaluated.evaluate()
    seconds = {"cpu": time.process_time() - start[0], "wall": time.perf_counter() - start[1]}
    return seconds, {name: metrics[f"eval_{name}"] for name in METRICS}


def added_megabytes() -> float:
    """What the process's first evaluation adds to its peak, after one of a few rows."""
    data: Any = evaluated.eval_dataset
    evaluated.evaluate(data.select(range(8)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluated.evaluate()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def mrpc(words: argparse.Namespace) -> tuple[Any, Dataset | None, Any, int]:
    task = prepare_task(TaskArguments(dataset=words.dataset, model=words.model))
    return task.new_model(0), task.validation, task.collator, 2


def tokens(words: argparse.Namespace) -> tuple[Any, Dataset, Any, int]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=100, max_position_embeddings=LENGTH, num_labels=CLASSES, **sizes)
    ids = torch.randint(5, 100, (ROWS, LENGTH))
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    labels = torch.randint(0, CLASSES, (ROWS, LENGTH)).tolist()
    return (
        BertForTokenClassification(config),
        Dataset.from_dict({**rows, "labels": labels}),
        default_data_collator,
        CLASSES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(ARMS))
    add_options(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    words = parser.parse_args()
    if words.what == "mrpc":
        check(parser, words)
    context, found, megabytes = multiprocessing.get_context("spawn"), dict[str, Any](), dict[str, float]()

    def arm(name: str, pool: Any) -> Callable[[], Seconds]:
        def run() -> Seconds:
            seconds, found[name] = pool.apply(evaluate)
            return seconds

        return run

    with ExitStack() as open_until_the_end:
        words.scratch = open_until_the_end.enter_context(TemporaryDirectory())
        arms = {}
        for name, how in ARMS[words.what].items():
            pool = open_until_the_end.enter_context(context.Pool(1, begin, (words, *how)))
            megabytes[name] = pool.apply(added_megabytes)
            arms[name] = arm(name, pool)
        about: dict[str, Any] = {"batch": words.batch_size}
        if words.what == "mrpc":
            about |= {"model": name_of(words.model)}
        else:
            about |= {"rows": ROWS, "tokens a row": LENGTH, "classes": CLASSES}
        record = measure(arms, "Trainer", rounds=words.rounds, about=about)
    for name, metrics in found.items():
        metrics["MB added"] = megabytes[name]
    write({**record, "found": found}, f"evaluation_{words.what}")


if __name__ == "__main__":
    main()
