"""What checkpoints cost beside the stock class: a save, a resume, and a step in which nothing is saved.

A BERT of 22.7 M parameters with its AdamW state (272 MB) is saved and gone on from; a small one is trained without saves.
The arms take turns within one process, the first round is dropped, and the control is the stock class a second time: how
far its ratio is from 1 is this machine's noise. Saves and resumes are in wall seconds, since they wait for the disk; steps
in CPU seconds. A save that ends beside the training (`async_save`) is timed for as long as it blocks.

Writes `docs/proof/checkpoint_costs.md`.
"""

import gc
import logging
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from recording import BATCH, STEPS, WARM_UP, StepClock, rows, summary
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.checkpoints.durable import sync_tree
from trainer_ext.checkpoints.manifest import verify, write_manifest
from trainer_ext.parity.environment import environment

PROOF = Path(__file__).parents[1] / "docs" / "proof" / "checkpoint_costs.md"
ROUNDS = 9
STOCK, CONTROL, OURS, BESIDE = "stock", "stock, control", "ours", "ours, async_save"
LARGE = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
SMALL = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS: dict[str, Callable[[Path], Any]] = {"fsync": sync_tree, "hash": write_manifest, "verify": verify}
Rounds = list[dict[str, float]]


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


def save_seconds(arm: str, folder: str) -> float:
    """One step and its save."""
    clock = SaveClock()
    cls = timed(Trainer if arm.startswith(STOCK) else CustomTrainer, clock)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "async_save": arm == BESIDE}
    trainer_of(cls, LARGE, f"{folder}/{arm}", **options).train()
    return clock.saved


def resume_seconds(arm: str, folder: str) -> float:
    """From the call of `train` until all is loaded, of a checkpoint in the page cache."""
    clock = SaveClock()
    trainer = trainer_of(
        Trainer if arm.startswith(STOCK) else CustomTrainer, LARGE, f"{folder}/{OURS}", max_steps=1, save_strategy="no"
    )
    trainer.add_callback(clock)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=f"{folder}/{OURS}/checkpoint-1")
    return clock.begun - start


def step_seconds(arm: str, folder: str) -> float:
    """CPU time of a step of a small model, of which nothing is saved."""
    clock = StepClock()
    options = {"max_steps": WARM_UP + STEPS, "save_strategy": "no"}
    trainer = trainer_of(Trainer if arm.startswith(STOCK) else CustomTrainer, SMALL, folder, **options)
    trainer.add_callback(clock)
    gc.collect()
    trainer.train()
    return clock.seconds / STEPS


def part_seconds(part: str, folder: str) -> float:
    """A part of our save, or of our resume, on a copy of the checkpoint that is in the page cache alone."""
    copy = Path(folder) / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(Path(folder) / OURS / "checkpoint-1", copy)
    start = time.perf_counter()
    PARTS[part](copy)
    return time.perf_counter() - start


def in_turns(measure: Callable[[str, str], float], arms: list[str], folder: str) -> Rounds:
    """Every arm's seconds in each round but the first; who begins changes from round to round."""
    rounds = []
    for turn in range(ROUNDS):
        order = arms[turn % len(arms) :] + arms[: turn % len(arms)]
        rounds.append({arm: measure(arm, folder) for arm in order})
    return rounds[1:]


def section(title: str, rounds: Rounds, unit: str = "ms") -> list[str]:
    """A table of an arm's times, and of its ratios to the stock class round by round."""
    lines = [f"## {title}", "", f"| | {unit}: min | median | max | ratio to stock: min | median | max |"]
    lines.append("|---" * 7 + "|")
    for arm in rounds[0]:
        times = summary([1000 * one[arm] for one in rounds])
        cells = [f"{times[key]:,.2f}" for key in ("min", "median", "max")]
        if STOCK in rounds[0]:
            ratios = summary([one[arm] / one[STOCK] for one in rounds])
            cells += [f"{ratios[key]:.3f}" for key in ("min", "median", "max")]
        lines.append(f"| {arm} | {' | '.join(cells + [''] * (6 - len(cells)))} |")
    return [*lines, ""]


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        steps = in_turns(step_seconds, [STOCK, CONTROL, OURS], folder)
        saves = in_turns(save_seconds, [STOCK, CONTROL, OURS, BESIDE], folder)
        parts = in_turns(part_seconds, list(PARTS), folder)
        resumes = in_turns(resume_seconds, [STOCK, CONTROL, OURS], folder)
    shown = ", ".join(f"{name} {value}" for name, value in environment().items())
    load = median(one[OURS] for one in resumes)
    lines = ["# What checkpoints cost", ""]
    lines += [f"Generated on {date.today().isoformat()} by `python benchmarks/checkpoints.py`: {shown}.", ""]
    lines += [
        f"{ROUNDS - 1} rounds in which the arms take turns. The control is the stock class again: its ratio is the noise "
        "of the machine. The checkpoint is of a BERT of 22.7 M parameters with its AdamW state, 272 MB. With "
        "`async_save` it is the time that a save blocks.",
        "",
    ]
    lines += section("A save", saves) + section("Parts of ours", parts)
    lines += section("A resume, until all is loaded", resumes)
    lines += [f"Of ours, `verify` is {median(one['verify'] for one in parts) / load:.0%}.", ""]
    lines += section("A step without a save (CPU)", steps)
    PROOF.write_text("\n".join(lines).rstrip() + "\n")
    print(PROOF.read_text())


if __name__ == "__main__":
    main()
