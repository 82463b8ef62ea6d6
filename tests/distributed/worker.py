"""Every case of `test_ranks.py`, on however many processes started this; rank 0 writes what it saw as JSON.

torchrun --nproc_per_node 3 -m tests.distributed.worker OUT.json
"""

import json
import os
import sys
import tempfile
from contextlib import contextmanager

import torch
from datasets import Value
from torch import nn
from transformers import Trainer, default_data_collator

from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, accelerate_loop, exact_loss
from trainer_ext.loop_settings import loop_settings

GLOBAL_BATCH = 12
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
WEIGHTS = [0.7, 3.1]  # whose sums float32 would round
# Rows: 22 leave 10 for the last round (of 12), 13 leave one: with three ranks, two have none of their own.
CASES = {
    "full rounds": {"rows": 24},
    "uneven tail": {"rows": 22},
    "ranks without rows": {"rows": 13},
    "fewer rows than ranks": {"rows": 2},
    "accumulation": {"rows": 22, "gradient_accumulation_steps": 2},
    "tokens": {"rows": 13, "tokens": True},
    "the head's own loss": {"rows": 13, "loss": "model"},
    "regression": {"rows": 13, "num_labels": 1},
    "split batches": {"rows": 13, "accelerator_config": {"split_batches": True}},
    "stock": {"rows": 22, "trainer": Trainer},
    "repeated rows left in": {"rows": 13, "leak": True},
}


@contextmanager
def leaking(leak):
    """The mutation: training takes the rows that the loader repeats for rows of the step."""
    kept = exact_loss.without_repeated_rows
    exact_loss.without_repeated_rows = (lambda batch: batch) if leak else kept
    try:
        yield
    finally:
        exact_loss.without_repeated_rows = kept


def run(case):
    """One training and evaluation; what it came to."""
    options = dict(CASES[case])
    trainer_class, count = options.pop("trainer", CustomTrainer), options.pop("rows")
    leak = options.pop("leak", False)
    tokens, num_labels = options.pop("tokens", False), options.pop("num_labels", 2)
    data = rows(count, tokens=tokens)
    if num_labels == 1:
        data = data.cast_column("labels", Value("float64"))
    elif options.get("loss") is None and trainer_class is CustomTrainer:
        options["class_weights"] = WEIGHTS
    batch = GLOBAL_BATCH // options.get("gradient_accumulation_steps", 1)
    split = "accelerator_config" in options
    args = CustomTrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=batch if split else batch // RANKS,
        per_device_eval_batch_size=GLOBAL_BATCH if split else GLOBAL_BATCH // RANKS,
        log_level="error",
        dataloader_pin_memory=False,
        **options,
    )
    model = tiny_model(dropout=0.0, dtype=torch.float64, tokens=tokens, num_labels=num_labels)
    steps = []

    class Spy(trainer_class):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            steps.append(self.accelerator.reduce(loss.clone(), "mean").item())
            return loss

    trainer = Spy(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=default_data_collator)
    with leaking(leak):
        trainer.train()
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "world_size": args.world_size,
        "losses": steps,
        "grad_norms": logged(trainer, "grad_norm"),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": nn.utils.parameters_to_vector(trainer.model.parameters()).tolist(),
    }


def run_accelerate_loop(case):
    """The same by the loop over `accelerate.Accelerator`."""
    data = rows(CASES[case]["rows"])
    model = tiny_model(dropout=0.0, dtype=torch.float64)
    args = CustomTrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, max_steps=4, per_device_train_batch_size=GLOBAL_BATCH // RANKS,
        per_device_eval_batch_size=GLOBAL_BATCH // RANKS, learning_rate=1e-2, report_to="none",
    )  # fmt: skip
    losses = []
    result = accelerate_loop.train(
        model,
        data,
        default_data_collator,
        loop_settings(args),
        eval_dataset=data,
        class_weights=torch.tensor(WEIGHTS, dtype=torch.float64),
        on_step=lambda **step: losses.append(step["loss"]),
        progress=False,
    )
    return {"losses": losses, "eval_loss": result.evaluations[-1]["loss"]}


def main():
    found = {case: run(case) for case in CASES}
    found["accelerate loop"] = run_accelerate_loop("ranks without rows")
    if int(os.environ.get("RANK", "0")) == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
