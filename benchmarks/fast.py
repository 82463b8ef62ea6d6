"""What the fast profile is worth on MRPC, what each of its settings is, and what the defaults of this toolkit cost.

All arms train 64 rows of the train split: whole batches out of an epoch in the arm's order, grouped by length or random,
one from each part of its range of widths, so that they need the padding of that epoch; the record says both. Each arm is a
process of its own that trains its rows again and again, and they take turns of 64 rows; the first two turns, in which
memory is first touched and kernels are made for each shape, do not count.

    python benchmarks/fast.py QUESTION [--dataset MRPC] [--model CHECKPOINT] [--rounds N]

`pace`: run_glue's defaults (stock Trainer, float32, padded to 128 tokens, batch 8), the stock Trainer with batch 16 and
each batch padded to its longest row, and the fast profile (batch 16). `settings`: the profile with one setting changed.
`memory`: the profile, and the same without `keep_freed_memory`. `ranks`: the same rows by two ranks of DDP, with the cores
divided and without. These use all cores. `defaults`: CustomTrainer against the stock Trainer at equal settings and in
equal order, on one core. `tokens`: the token ids of the whole corpus, read or made. Writes
`benchmarks/results/fast_QUESTION.json`.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
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
ROUNDS = {"pace": 21, "settings": 21, "memory": 21, "ranks": 41, "defaults": 41, "tokens": 8}
QUIET: dict[str, Any] = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "dataloader_pin_memory": False, "num_train_epochs": 10_000, "per_device_train_batch_size": BATCH,
    "logging_steps": 500,
}  # fmt: skip
AS_DRAWN = {"train_sampling_strategy": "sequential"}

FAST = {"cls": CustomTrainer, **fast_profile(use_cpu=True)}
PACE: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "run_glue's defaults": {"cls": Trainer, "pad": True, "mixed": True, "per_device_train_batch_size": 8},
    "padded to the longest row": {"cls": Trainer, "mixed": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "fast, in float32": {**FAST, "bf16": False},
    "fast, in random order": {**FAST, "mixed": True},
    "fast, AdamW that is not fused": {**FAST, "optim": "adamw_torch"},
    "fast, with a loading process": {**FAST, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "fast, with SDPA": {**FAST, "attn_implementation": "sdpa"},
}
MEMORY: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "fast, freed memory given back": {**FAST, "keep_freed_memory": False},
}
RANKS: dict[str, dict[str, Any]] = {
    "two ranks, cores divided": {**FAST, "per_device_train_batch_size": BATCH // 2},
    "two ranks": {**FAST, "per_device_train_batch_size": BATCH // 2, "divide_cores": False},
    "one process": FAST,
}
SAME = {**FAST, "attn_implementation": None}  # which the stock class does not know
DEFAULTS: dict[str, dict[str, Any]] = {
    "Trainer": {**SAME, "cls": Trainer},
    "CustomTrainer": SAME,
    "CustomTrainer, on_non_finite=ignore": {**SAME, "on_non_finite": "ignore"},
}
ARMS = {
    "pace": PACE,
    "settings": SETTINGS,
    "memory": MEMORY,
    "ranks": RANKS,
    "defaults": DEFAULTS,
}  # the first of each is what the others are divided by


class EpochClock(TrainerCallback):
    """A turn is an epoch, from the end of one to the end of the next; the first is over before the first turn."""

    def __init__(self) -> None:
        self._segments = Segments(memory=True)

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


def train(task: Task, *, cls: type[Trainer], pad: bool = False, **settings: Any) -> None:
    """An arm, in a process of its own: train the rows of `task`, an epoch whenever it is told to."""
    padded = DataCollatorWithPadding(task.tokenizer, padding="max_length", max_length=LENGTH)
    model = task.new_model(0)
    with TemporaryDirectory() as folder:
        args = CustomTrainingArguments(folder, **{**QUIET, **settings, **AS_DRAWN})
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


def drawn(task: Task) -> tuple[dict[str, Task], dict[str, str]]:
    """`task` with few rows, for arms that group rows by length and for those that do not, and what is padded there.

    Both are whole batches out of an epoch in their order, one from each part of its range of widths, so that a row has the
    padding of the epoch's.
    """
    lengths = measure_rows(task.train, "input_ids")
    orders = {
        "grouped": torch.tensor([*LengthGroupedOrder(lengths, BATCH, seed=0)]),
        "random": torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)),
    }
    tasks, said = {}, {}
    for name, order in orders.items():
        epoch = [rows for rows in order.split(BATCH) if len(rows) == BATCH]
        by_width = sorted(epoch, key=lambda rows: int(lengths[rows].max()))
        chosen = [by_width[len(by_width) * (2 * i + 1) // (2 * BATCHES)] for i in range(BATCHES)]
        rows = task.train.select(torch.cat(chosen).tolist()).flatten_indices()
        tasks[name] = dataclasses.replace(task, train=rows, validation=None)
        here, whole = (sum(int(lengths[rows].max()) for rows in batches) / len(batches) for batches in (chosen, epoch))
        said[f"padded tokens a row, {name}"] = f"{here:.1f} ({whole:.1f} of the epoch)"
    return tasks, said


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
    whole = prepare_task(TaskArguments(asked.dataset, asked.model))
    tasks, padding = drawn(whole)
    arms = ARMS[asked.question]
    if asked.run:
        arm = arms[asked.run]
        train(tasks["random" if arm.pop("mixed", False) else "grouped"], **arm)
        return
    programs = {name: [sys.executable, *sys.argv, "--run", name] for name in arms}
    about |= {
        "rows": BATCHES * BATCH,
        "batch": BATCH,
        "bf16": FAST["bf16"],
        "parameters": whole.new_model(0).num_parameters(),
        **padding,
    }
    found = take_turns(programs, next(iter(arms)), rounds=rounds, about=about)
    write(found, f"fast_{asked.question}")


if __name__ == "__main__":
    main()
