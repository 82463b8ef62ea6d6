"""A training with `Throughput` on each rank, whose clock ticks by the rank: python throughput_run.py OUT."""

import json
import os
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments, default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext.callbacks import throughput
from trainer_ext.engine import runs_on

RANK = int(os.environ["RANK"])


class Ticking(Trainer):
    """A micro-batch takes one second on rank 0, two on rank 1."""

    now, real = 0.0, 0

    def training_step(self, model, inputs, *args, **kwargs):
        Ticking.now += RANK + 1
        Ticking.real += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)


def main():
    out = Path(sys.argv[1])
    throughput.perf_counter = lambda: Ticking.now
    args = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=2,
        max_steps=4, per_device_train_batch_size=3, dataloader_pin_memory=False, log_level="error",
    )  # fmt: skip
    lengths = iter([1 + i * i % 8 for i in range(48)])
    data = rows(48).map(lambda row: {"attention_mask": [1] * (n := next(lengths)) + [0] * (8 - n)})
    run = Ticking(
        model=tiny_model(attn_implementation="eager"),
        args=args,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[throughput.Throughput()],
    )
    run.train()
    seen = {
        "engine": runs_on(run).engine,
        "world_size": run.args.world_size,
        "entries": [entry for entry in run.state.log_history if "samples_per_second" in entry],
        "real": Ticking.real,
    }
    (out / f"rank{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
