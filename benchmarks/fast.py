"""What the fast profile is worth on MRPC, what each of its settings is, and what the defaults of this toolkit cost.

All arms of a question train the same rows of the train split, once: whole batches of like length out of an epoch's, one
from each part of its range of widths. In random order they need about the padding of an epoch in random order; the
record says both. The clock starts at the first step, with its batch at hand, and stops at the end of the last. One process
with all cores.

    python benchmarks/fast.py pace --dataset MRPC --model MINILM [--rounds 8]

`pace`: run_glue's defaults (stock Trainer, float32, padded to 128 tokens, batch 8), the stock Trainer with batch 16 and
each batch padded to its longest row, and the fast profile (batch 16). `settings`: the profile with one setting changed.
`defaults`: CustomTrainer against the stock Trainer at equal settings, and without its guard against what is not finite.
`tokens`: the token ids of the whole corpus, read or made. Writes `benchmarks/results/fast_QUESTION.json`.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback
from transformers import logging as transformers_logging

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

from pairs import ROUNDS, Seconds, measure, write  # noqa: E402

from trainer_ext import CustomTrainer, CustomTrainingArguments  # noqa: E402
from trainer_ext.data import load_splits, tokenize  # noqa: E402
from trainer_ext.fast import fast_profile  # noqa: E402
from trainer_ext.models import load_tokenizer  # noqa: E402
from trainer_ext.samplers import LengthGroupedOrder, measure_rows  # noqa: E402
from trainer_ext.task import Task, TaskArguments, prepare_task  # noqa: E402

BATCHES, BATCH, LENGTH = 4, 16, 128
QUIET: dict[str, Any] = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "num_train_epochs": 1, "per_device_train_batch_size": BATCH,
}  # fmt: skip
CHANGED: dict[str, dict[str, Any]] = {
    "fast, in float32": {"bf16": False},
    "fast, in random order": {"grouped": False},
    "fast, AdamW that is not fused": {"optim": "adamw_torch"},
    "fast, with a loading process": {"dataloader_num_workers": 1},
}


class Clock(TrainerCallback):
    """From the first step's beginning to the last step's end."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.began = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.process_time(), time.perf_counter()

    def seconds(self) -> Seconds:
        return {"cpu": self.ended[0] - self.began[0], "wall": self.ended[1] - self.began[1]}


class AsTheyAre(Sampler[int]):
    """The rows in the order of the dataset, which is that of the grouped batches."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows))

    def __len__(self) -> int:
        return self.rows


def trained(
    task: Task, cls: type[Trainer], *, pad: bool = False, grouped: bool = False, **settings: Any
) -> Callable[[], Seconds]:
    """An arm: an epoch of `task` by `cls`, from its start."""
    padded = DataCollatorWithPadding(task.tokenizer, padding="max_length", max_length=LENGTH)
    order = {"train_sampler": AsTheyAre(len(task.train))} if grouped else {}

    def arm() -> Seconds:
        clock = Clock()
        with TemporaryDirectory() as folder:
            args = CustomTrainingArguments(folder, **{**QUIET, **settings, "train_sampling_strategy": "random"})
            collator = padded if pad else task.collator
            trainer = cls(task.new_model(0), args, collator, task.train, callbacks=[clock], **order)
            trainer.train()
        return clock.seconds()

    return arm


def pace(task: Task) -> tuple[dict[str, Callable[[], Seconds]], str]:
    profile = {**fast_profile(use_cpu=True), "grouped": True}
    arms = {
        "fast": trained(task, CustomTrainer, **profile),
        "run_glue's defaults": trained(task, Trainer, pad=True, per_device_train_batch_size=8),
        "padded to the longest row": trained(task, Trainer),
    }
    return arms, "fast"


def settings(task: Task) -> tuple[dict[str, Callable[[], Seconds]], str]:
    profile = {**fast_profile(use_cpu=True), "grouped": True}
    changed = {name: trained(task, CustomTrainer, **{**profile, **change}) for name, change in CHANGED.items()}
    return {"fast": trained(task, CustomTrainer, **profile), **changed}, "fast"


def defaults(task: Task) -> tuple[dict[str, Callable[[], Seconds]], str]:
    same = fast_profile(use_cpu=True)
    arms = {
        "Trainer": trained(task, Trainer, **same),
        "CustomTrainer": trained(task, CustomTrainer, **same),
        "CustomTrainer, on_non_finite=ignore": trained(task, CustomTrainer, **same, on_non_finite="ignore"),
    }
    return arms, "Trainer"


def tokens(asked: argparse.Namespace) -> tuple[dict[str, Callable[[], Seconds]], str]:
    data = load_splits(asked.dataset)

    def arm(*, cache: bool, lost: bool) -> Callable[[], Seconds]:
        def tokenised() -> Seconds:
            tokenizer = load_tokenizer(asked.model)
            began = time.process_time(), time.perf_counter()
            encoded = tokenize(data, tokenizer, cache=cache)
            seconds = {"cpu": time.process_time() - began[0], "wall": time.perf_counter() - began[1]}
            if lost:
                for split in encoded.values():
                    for file in split.cache_files:
                        Path(file["filename"]).unlink()
            return seconds

        return tokenised

    arms = {
        "read": arm(cache=True, lost=False),
        "found by datasets": arm(cache=False, lost=False),
        "made, without the cache": arm(cache=False, lost=True),
    }
    return arms, "read"


def drawn(task: Task) -> tuple[Task, dict[str, str]]:
    """`task` with `BATCHES` batches to train on, and its padded tokens a row beside those of the whole epoch."""
    lengths = measure_rows(task.train, "input_ids")
    whole = torch.tensor([*LengthGroupedOrder(lengths, BATCH, seed=0)]).split(BATCH)
    by_width = sorted((rows for rows in whole if len(rows) == BATCH), key=lambda rows: int(lengths[rows].max()))
    chosen = [by_width[len(by_width) * (2 * i + 1) // (2 * BATCHES)] for i in range(BATCHES)]
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).split(BATCH)

    def padded(batches: Iterable[Tensor]) -> float:
        cells = [(len(rows) * int(lengths[rows].max()), len(rows)) for rows in batches]
        return round(sum(cell for cell, _ in cells) / sum(rows for _, rows in cells), 1)

    few = torch.cat(chosen)
    mixed = [
        rows
        for seed in range(20)
        for rows in few[torch.randperm(len(few), generator=torch.Generator().manual_seed(seed))].split(BATCH)
    ]
    tokens = {"grouped": (chosen, whole), "random": (mixed, shuffled)}
    said = {
        f"padded tokens a row, {name}": f"{padded(here)} ({padded(every)} of the epoch)"
        for name, (here, every) in tokens.items()
    }
    return dataclasses.replace(task, train=task.train.select(few.tolist()).flatten_indices(), validation=None), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("pace", "settings", "defaults", "tokens"))
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    transformers_logging.set_verbosity_error()
    about: dict[str, Any] = {"model": Path(asked.model).name}
    if asked.question == "tokens":
        arms, base = tokens(asked)
    else:
        task, padding = drawn(prepare_task(TaskArguments(asked.dataset, asked.model)))
        about |= {"rows": len(task.train), "batch": BATCH, "parameters": task.new_model(0).num_parameters(), **padding}
        arms, base = {"pace": pace, "settings": settings, "defaults": defaults}[asked.question](task)
    found = measure(arms, base, rounds=asked.rounds, about=about)
    write(found, f"fast_{asked.question}")


if __name__ == "__main__":
    main()
