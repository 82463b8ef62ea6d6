"""What the fast profile is worth on MRPC, what each of its settings is, and what the defaults of this toolkit cost.

All arms of a question train the same rows of the train split: whole batches of like length out of an epoch's, one from
each part of its range of widths. In random order they need about the padding of an epoch in random order; the record
says both. Each arm is a process of its own that trains these rows again and again, and they take turns of an epoch; the
first two epochs, in which memory is first touched and kernels are made for each shape, do not count.

    python benchmarks/fast.py QUESTION [--dataset MRPC] [--model CHECKPOINT] [--rounds 11]

`pace`: run_glue's defaults (stock Trainer, float32, padded to 128 tokens, batch 8), the stock Trainer with batch 16 and
each batch padded to its longest row, and the fast profile (batch 16). `settings`: the profile with one setting changed.
`ranks`: the same rows by two ranks of DDP, with the cores divided and without. These use all cores. `defaults`:
CustomTrainer against the stock Trainer at equal settings and in equal order, on one core. `tokens`: the token ids of the
whole corpus, read or made. Writes `benchmarks/results/fast_QUESTION.json`.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback
from transformers import logging as transformers_logging

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

from mrpc import add_options, check, name_of  # noqa: E402
from pairs import Seconds, Segments, measure, pin_to_one_core, take_turns, write  # noqa: E402

from trainer_ext import CustomTrainer, CustomTrainingArguments  # noqa: E402
from trainer_ext.data import load_splits, tokenize  # noqa: E402
from trainer_ext.fast import fast_profile  # noqa: E402
from trainer_ext.models import load_tokenizer  # noqa: E402
from trainer_ext.rehearsal.processes import free_port  # noqa: E402
from trainer_ext.samplers import LengthGroupedOrder, measure_rows  # noqa: E402
from trainer_ext.task import Task, TaskArguments, prepare_task  # noqa: E402

BATCHES, BATCH, LENGTH = 4, 16, 128
ROUNDS = {"pace": 11, "settings": 11, "ranks": 11, "defaults": 41, "tokens": 8}
QUIET: dict[str, Any] = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "dataloader_pin_memory": False, "num_train_epochs": 10_000, "per_device_train_batch_size": BATCH,
    "logging_steps": 500,
}  # fmt: skip

# The rows come grouped already, so that the profile's own order of them is to leave them as they are.
IN_ORDER = {"train_sampling_strategy": "sequential"}
FAST = {"cls": CustomTrainer, **fast_profile(use_cpu=True), **IN_ORDER}
PACE: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "run_glue's defaults": {"cls": Trainer, "pad": True, "per_device_train_batch_size": 8},
    "padded to the longest row": {"cls": Trainer},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "fast, in float32": {**FAST, "bf16": False},
    "fast, in random order": {**FAST, "train_sampling_strategy": "random"},
    "fast, AdamW that is not fused": {**FAST, "optim": "adamw_torch"},
    "fast, with a loading process": {**FAST, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "fast, with eager attention": {**FAST, "attention": "eager"},
}
RANKS: dict[str, dict[str, Any]] = {
    "two ranks, cores divided": {**FAST, "per_device_train_batch_size": BATCH // 2},
    "two ranks": {**FAST, "per_device_train_batch_size": BATCH // 2, "divide_cores": False},
    "one process": FAST,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Trainer": {**FAST, "cls": Trainer},
    "CustomTrainer": FAST,
    "CustomTrainer, on_non_finite=ignore": {**FAST, "on_non_finite": "ignore"},
}
ARMS = {
    "pace": PACE,
    "settings": SETTINGS,
    "ranks": RANKS,
    "defaults": DEFAULTS,
}  # the first of each is what the others are divided by


class EpochClock(TrainerCallback):
    """A turn is an epoch, from the end of one to the end of the next; the first is over before the first turn."""

    def __init__(self) -> None:
        self._segments = Segments()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._segments.next()


def launch(count: int) -> None:
    """Run this command as so many ranks, until the first one, which has the turns, ends."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    turns = tuple(int(os.environ[name]) for name in ("TURN", "TOOK"))
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            pass_fds=turns,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    ranks[0].wait()
    for rank in ranks[1:]:
        rank.kill()


def train(task: Task, *, cls: type[Trainer], pad: bool = False, attention: str | None = None, **settings: Any) -> None:
    """An arm, in a process of its own: train the rows of `task`, an epoch whenever it is told to."""
    padded = DataCollatorWithPadding(task.tokenizer, padding="max_length", max_length=LENGTH)
    model = task.new_model(0)
    if attention is not None:
        model.set_attn_implementation(attention)
    with TemporaryDirectory() as folder:
        args = CustomTrainingArguments(folder, **{**QUIET, **settings})
        trainer = cls(model, args, padded if pad else task.collator, task.train)
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            trainer.add_callback(EpochClock())
        trainer.train()


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
    parser.add_argument("question", choices=tuple(ROUNDS))
    add_options(parser)
    parser.add_argument("--rounds", type=int, help="turns of each arm, the first of which does not count")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in an arm's own process
    asked = parser.parse_args()
    check(parser, asked)
    transformers_logging.set_verbosity_error()
    about: dict[str, Any] = {"model": name_of(asked.model)}
    rounds = asked.rounds or ROUNDS[asked.question]
    if asked.question == "tokens":
        write(measure(*tokens(asked), rounds=rounds, about=about), "fast_tokens")
        return
    if asked.run in RANKS and asked.run != "one process" and "RANK" not in os.environ:
        launch(2)
        return
    if asked.question == "defaults":
        pin_to_one_core()
        torch.set_num_threads(1)
    task, padding = drawn(prepare_task(TaskArguments(asked.dataset, asked.model)))
    arms = ARMS[asked.question]
    if asked.run:
        train(task, **arms[asked.run])
        return
    programs = {name: [sys.executable, *sys.argv, "--run", name] for name in arms}
    about |= {"rows": len(task.train), "batch": BATCH, "parameters": task.new_model(0).num_parameters(), **padding}
    found = take_turns(programs, next(iter(arms)), rounds=rounds, about=about)
    write(found, f"fast_{asked.question}")


if __name__ == "__main__":
    main()
