"""How accurate trainings of MRPC end up, over several seeds: the stock recipe, the same with the fast profile, and ours.

`stock` and `fast`: rate 5e-5, 3 epochs, batch 16, everything else as it comes; `stock` is the stock Trainer in float32 with
each batch padded to its longest row. `chosen`: the recipe of `examples/paraphrases.py`. One thread, so that a run may share
the machine: its cost is CPU seconds.

    python benchmarks/accuracy.py [--dataset MRPC] [--model CHECKPOINT] --arm stock [--seeds 0 1 2 3 4] [--keep FOLDER]

Each finished run is put into `benchmarks/results/accuracy.json` at once, with the means over the seeds; `--keep` saves the
trained model, of `stock` or `fast`, for `benchmarks/evaluation.py`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Trainer

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import paraphrases  # noqa: E402
from mrpc import add_options, check, name_of  # noqa: E402
from pairs import RESULTS  # noqa: E402

from trainer_ext import CustomTrainer, CustomTrainingArguments  # noqa: E402
from trainer_ext.fast import fast_profile  # noqa: E402
from trainer_ext.finetune import build_trainer  # noqa: E402
from trainer_ext.parity.environment import environment  # noqa: E402
from trainer_ext.task import Task, TaskArguments, prepare_task  # noqa: E402

RECORD = RESULTS / "accuracy.json"
STOCK: dict[str, Any] = {"learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 16}
QUIET: dict[str, Any] = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error"
}  # fmt: skip
METRICS = ("accuracy", "f1", "train_cpu_seconds")


def stock(task: Task, folder: str, seed: int) -> Trainer:
    return build_trainer(task, CustomTrainingArguments(folder, **STOCK, **QUIET, seed=seed), trainer_class=Trainer)


def fast(task: Task, folder: str, seed: int) -> Trainer:
    args = CustomTrainingArguments(folder, **fast_profile(**STOCK, **QUIET, seed=seed))
    return build_trainer(task, args, trainer_class=CustomTrainer)


def chosen(task: Task, folder: str, seed: int) -> Trainer:
    return paraphrases.build_trainer(task, CustomTrainingArguments(folder, **paraphrases.RECIPE, **QUIET, seed=seed))


ARMS: dict[str, Callable[[Task, str, int], Trainer]] = {"stock": stock, "fast": fast, "chosen": chosen}


def run(task: Task, arm: str, seed: int, keep: str | None) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        trainer = ARMS[arm](task, folder, seed)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        found = trainer.evaluate()
    if keep is not None:
        trainer.save_model(keep)
    return {
        "arm": arm, "seed": seed, "accuracy": found["eval_accuracy"], "f1": found["eval_f1"],
        "train_cpu_seconds": seconds, "steps": trainer.state.global_step,
    }  # fmt: skip


def record(runs: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """The runs, and mean and standard deviation of each arm that has two or more."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for found in sorted(runs, key=lambda r: (list(ARMS).index(r["arm"]), r["seed"])):
        arms.setdefault(found["arm"], []).append(found)
    summary = {
        arm: {name: {"mean": mean(r[name] for r in of), "sd": stdev(r[name] for r in of)} for name in METRICS}
        for arm, of in arms.items()
        if len(of) > 1
    }
    return {
        "date": date.today().isoformat(), "environment": environment(), "about": about, "summary": summary,
        "runs": [found for of in arms.values() for found in of],
    }  # fmt: skip


def add(found: dict[str, Any], **about: Any) -> None:
    """Put a run into the record, in the place of an earlier one of its arm and seed."""
    runs = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []
    kept = [r for r in runs if (r["arm"], r["seed"]) != (found["arm"], found["seed"])]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record([*kept, found], **about), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--keep", help="a folder for the trained model of the last seed")
    asked = parser.parse_args()
    check(parser, asked)
    torch.set_num_threads(1)
    task = prepare_task(TaskArguments(asked.dataset, asked.model))
    for seed in asked.seeds:
        found = run(task, asked.arm, seed, asked.keep)
        add(found, model=name_of(asked.model))
        print(found, flush=True)


if __name__ == "__main__":
    main()
