"""One training on however many hosts started this: accumulation, class weights, clipping and an uneven tail.

Rank 0 writes what every rank saw: `LAUNCHER .. -m tests.distributed.whole_run OUT.json float64`.
"""

import json
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object

from tests.conftest import logged, rows, tiny_model
from tests.distributed.worker import GLOBAL_BATCH, RANKS, WEIGHTS, collate, replaced
from trainer_ext import CustomTrainer, CustomTrainingArguments, exact_loss
from trainer_ext.engine import full_parameters, runs_on

ROWS = 22  # two steps an epoch, the second of 10: its last micro-batch leaves one rank of two with fewer
MICRO_BATCHES = 2
LEFT_IN = "repeated rows left in"  # the mutation: what evens the ranks out is trained on


def run(dtype):
    """Train; for every rank where it was and what it saw."""
    args = CustomTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        max_grad_norm=0.2,  # between the norms: some steps are clipped
        learning_rate=1e-2,
        class_weights=WEIGHTS,
        gradient_accumulation_steps=MICRO_BATCHES,
        per_device_train_batch_size=GLOBAL_BATCH // MICRO_BATCHES // RANKS,
        log_level="error",
        dataloader_pin_memory=False,
    )
    losses = defaultdict(float)  # the log's own are float32

    class Spy(CustomTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses[self.state.global_step] += self.accelerator.reduce(loss.clone(), "mean").item()
            return loss

    model = tiny_model(dropout=0.0, dtype=dtype)
    trainer = Spy(model=model, args=args, train_dataset=rows(ROWS), data_collator=collate)
    trainer.train()
    seen = {
        "host": os.readlink("/proc/self/ns/net"),
        "runs_on": asdict(runs_on(trainer)),
        "losses": list(losses.values()),
        "grad_norms": logged(trainer, "grad_norm"),
        "weights": {name: tensor.flatten().tolist() for name, tensor in full_parameters(trainer.model)},
    }
    return gather_object([seen])


def main():
    out, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    found = {"run": run(dtype)}
    with replaced(exact_loss, "without_repeated_rows", lambda batch: batch):
        found[LEFT_IN] = run(dtype)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
