"""What checkpoints cost beside the stock class: a save, a resume, and a step in which nothing is saved.

A BERT of 22.7 M parameters with its AdamW state (272 MB) is saved and gone on from; a small one is trained without saves.
Saves and resumes are in wall seconds, since they wait for the disk; steps in CPU seconds. A save that ends beside the
training (`async_save`) is timed for as long as it blocks. What a save of ours adds is timed once more by itself.

    python benchmarks/checkpoints.py

Prints tables and writes `checkpoint_save.json`, `checkpoint_parts.json`, `checkpoint_resume.json` and
`checkpoint_step.json`.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pairs import measure, write
from recording import BATCH, STEPS, WARM_UP, StepClock, rows
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.checkpoints.durable import sync_tree
from trainer_ext.checkpoints.manifest import verify, write_manifest

ROUNDS = 41
STOCK, OURS, BESIDE = "Trainer", "CustomTrainer", "CustomTrainer, async_save"
LARGE = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
SMALL = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS: dict[str, Callable[[Path], Any]] = {"fsync": sync_tree, "hash": write_manifest, "verify": verify}
Seconds = dict[str, float]


class SaveClock(TrainerCallback):
    """When the training begins, by which a resume has loaded all; and how long the last save took."""

    begun = 0.0
    saved = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()


def trainer_of(cls: type[Trainer], sizes: dict[str, int], folder: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    config = BertConfig(**sizes, intermediate_size=4 * sizes["hidden_size"])
    arguments = CustomTrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        **options,
    )
    trainer = cls(BertForSequenceClassification(config), arguments, train_dataset=rows())
    trainer.remove_callback(PrinterCallback)
    return trainer


def timed(cls: type[Trainer], clock: SaveClock) -> type[Trainer]:
    """The class, with its saves timed."""

    class Timed(cls):  # type: ignore[valid-type,misc]
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            start = time.perf_counter()
            super()._save_checkpoint(model, trial)
            clock.saved = time.perf_counter() - start

    return Timed


def save_seconds(arm: str, folder: str) -> Seconds:
    """One step and its save, with nothing on its way to the disk before."""
    clock = SaveClock()
    os.sync()
    cls = timed(Trainer if arm == STOCK else CustomTrainer, clock)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "async_save": arm == BESIDE}
    trainer_of(cls, LARGE, f"{folder}/{arm}", **options).train()
    return {"wall": clock.saved}


def resume_seconds(arm: str, folder: str) -> Seconds:
    """From the call of `train` until all is loaded, of a checkpoint in the page cache."""
    clock = SaveClock()
    trainer = trainer_of(
        Trainer if arm == STOCK else CustomTrainer, LARGE, f"{folder}/{OURS}", max_steps=1, save_strategy="no"
    )
    trainer.add_callback(clock)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=f"{folder}/{OURS}/checkpoint-1")
    return {"wall": clock.begun - start}


def step_seconds(arm: str, folder: str) -> Seconds:
    """CPU time of a step of a small model, of which nothing is saved."""
    clock = StepClock()
    options = {"max_steps": WARM_UP + STEPS, "save_strategy": "no"}
    trainer = trainer_of(Trainer if arm == STOCK else CustomTrainer, SMALL, folder, **options)
    trainer.add_callback(clock)
    trainer.train()
    return {"cpu": clock.seconds / STEPS}


def part_seconds(part: str, folder: str) -> Seconds:
    """A part of our save, or of our resume, on a copy of the checkpoint that is in the page cache alone."""
    copy = Path(folder) / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(Path(folder) / OURS / "checkpoint-1", copy)
    start = time.perf_counter()
    PARTS[part](copy)
    return {"wall": time.perf_counter() - start}


def in_turns(
    name: str, seconds: Callable[[str, str], Seconds], arms: Sequence[str], folder: str, **about: Any
) -> None:
    found = measure({arm: partial(seconds, arm, folder) for arm in arms}, arms[0], rounds=ROUNDS, about=about)
    write(found, f"checkpoint_{name}")


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        in_turns("step", step_seconds, [STOCK, OURS], folder, **SMALL)
        in_turns("save", save_seconds, [STOCK, OURS, BESIDE], folder, **LARGE)
        in_turns("parts", part_seconds, list(PARTS), folder, **LARGE)
        in_turns("resume", resume_seconds, [STOCK, OURS], folder, **LARGE)


if __name__ == "__main__":
    main()
