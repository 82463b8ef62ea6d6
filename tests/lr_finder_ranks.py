"""A range test and a training on each rank, and the training without it: lr_finder_ranks.py OUT."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import default_data_collator

from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, as_it_was
from trainer_ext.engine import runs_on
from trainer_ext.lr_finder import find_learning_rate


def trainer(out):
    args = CustomTrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        max_steps=4, learning_rate=1e-3, dataloader_pin_memory=False, log_level="error", per_device_train_batch_size=4,
    )  # fmt: skip
    return CustomTrainer(model=tiny_model(), args=args, train_dataset=rows(48), data_collator=default_data_collator)


def training(run, *, found=None):
    torch.manual_seed(5 + run.args.process_index)
    if found is not None:
        found.append(find_learning_rate(run, low=1e-4, high=1.0, steps=20))
        assert run.model_wrapped is run.model
    run.train()
    weights = [p.double().sum().item() for p in run.model.parameters()]
    return logged(run), logged(run, "grad_norm"), weights


def main():
    out, found = Path(sys.argv[1]), []
    plain = trainer(out)
    without = training(plain)
    run = trainer(out)
    seen = training(run, found=found)
    keep = as_it_was.keep_generators
    as_it_was.keep_generators = lambda trainer: lambda: None
    other = training(trainer(out), found=[])
    as_it_was.keep_generators = keep
    names = ("losses", "norms", "weights")
    record = {
        "engine": runs_on(run).engine,
        "world_size": run.args.world_size,
        "found": asdict(found[0]),
        "first_loss": without[0][0],
        **dict(zip(names, seen, strict=True)),
        **dict(zip([f"{name}_without" for name in names], without, strict=True)),
        "losses_other_generators": other[0],
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
