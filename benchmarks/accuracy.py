"""What the fast profile does to accuracy and F1: the same recipe with it and without, over several seeds.

Rate 5e-5, 3 epochs, batch 16, linear schedule, everything else as it comes; `stock` is the stock Trainer in float32 with
each batch padded to its longest row. One thread, so that a run may share the machine: its cost is CPU seconds.

    python benchmarks/fast_accuracy.py --dataset MRPC --model MINILM --seeds 0 1 2 3 4 [--arm stock]

Each finished run is put into `benchmarks/results/fast_accuracy.json` at once, with the means over the seeds.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Trainer

sys.path.append(str(Path(__file__).parent.parent))

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.fast import fast_profile
from trainer_ext.finetune import build_trainer
from trainer_ext.parity.environment import environment
from trainer_ext.task import Task, TaskArguments, prepare_task

RESULTS = Path(__file__).parent / "results" / "fast_accuracy.json"
RECIPE: dict[str, Any] = {"learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 16}
QUIET: dict[str, Any] = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error"
}  # fmt: skip
METRICS = ("accuracy", "f1", "train_cpu_seconds")


def run(task: Task, arm: str, seed: int) -> dict[str, Any]:
    own = {**RECIPE, **QUIET, "seed": seed}
    with TemporaryDirectory() as folder:
        args = CustomTrainingArguments(folder, **(fast_profile(**own) if arm == "fast" else own))
        trainer = build_trainer(task, args, trainer_class=CustomTrainer if arm == "fast" else Trainer)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        found = trainer.evaluate()
    settings = {name: getattr(args, name) for name in ("bf16", "train_sampling_strategy")}
    return {
        "arm": arm, "seed": seed, "accuracy": found["eval_accuracy"], "f1": found["eval_f1"],
        "train_cpu_seconds": seconds, "steps": trainer.state.global_step, **settings,
    }  # fmt: skip


def record(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs, and mean and standard deviation of each arm that has two or more."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for found in sorted(runs, key=lambda r: (r["arm"], r["seed"])):
        arms.setdefault(found["arm"], []).append(found)
    summary = {
        arm: {name: {"mean": mean(r[name] for r in of), "sd": stdev(r[name] for r in of)} for name in METRICS}
        for arm, of in arms.items()
        if len(of) > 1
    }
    return {
        "date": date.today().isoformat(), "environment": environment(), "about": RECIPE, "summary": summary,
        "runs": [found for of in arms.values() for found in of],
    }  # fmt: skip


def add(found: dict[str, Any]) -> None:
    """Put a run into the record, in the place of an earlier one of its arm and seed."""
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    kept = [r for r in runs if (r["arm"], r["seed"]) != (found["arm"], found["seed"])]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record([*kept, found]), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--arm", choices=("fast", "stock"), default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = prepare_task(TaskArguments(asked.dataset, asked.model))
    for seed in asked.seeds:
        found = run(task, asked.arm, seed)
        add(found)
        print(found, flush=True)


if __name__ == "__main__":
    main()
