"""Every case of `test_ranks.py`, on however many processes started this; rank 0 writes what it saw as JSON.

torchrun --nproc_per_node 3 -m tests.distributed.worker OUT.json
"""

import gc
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Value
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from tests.conftest import logged, rows, tiny_model
from trainer_ext import (
    CustomTrainer,
    CustomTrainingArguments,
    TokenBudgetBatches,
    WeightedOrder,
    accelerate_loop,
    exact_loss,
    samplers,
)
from trainer_ext.loop_settings import loop_settings
from trainer_ext.repeated_rows import UncountedBatch

GLOBAL_BATCH = 12
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
WEIGHTS = [0.7, 3.1]  # whose sums float32 would round
BY_LENGTH = {"rows": 32, "various": "lengths", "train_sampling_strategy": "group_by_length", "max_steps": 8}
IN_ORDER = {"train_sampling_strategy": "sequential"}
# Rows: 22 leave 10 for the last round (of 12), 13 leave one: with three ranks, two have none of their own.
# 32 rows of various lengths are three steps an epoch, the last of 8 rows.
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
    "one class a rank": {"rows": 24, "various": "classes", **IN_ORDER},
    "a rank all ignored": {"rows": 24, "various": "ignored", "tokens": True, **IN_ORDER},
    "a rank all ignored, the head's own loss": {
        "rows": 24, "various": "ignored", "tokens": True, "loss": "model", **IN_ORDER
    },
    "grouped by length": BY_LENGTH,
    "grouped by length, accumulation": {**BY_LENGTH, "gradient_accumulation_steps": 2},
    "grouped by length, split batches": {**BY_LENGTH, "accelerator_config": {"split_batches": True}},
    "rebalanced": {**BY_LENGTH, "train_sampling_strategy": "batch_rebalance"},
    "rebalanced, accumulation": {
        **BY_LENGTH, "train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2
    },
    "in order, accumulation": {"rows": 13, "gradient_accumulation_steps": 2, **IN_ORDER},
    "stream, ranks without rows": {"rows": 13, "stream": True},
    "stream, accumulation": {"rows": 13, "stream": True, "gradient_accumulation_steps": 2},
    "stream, fewer rows than ranks": {"rows": 2, "stream": True},
    "drawn by weight": {"rows": 22, "sampler": lambda data: WeightedOrder([1.0] * len(data), seed=5)},
    "budget of tokens": {
        "rows": 32, "various": "lengths", "max_steps": 8, "gradient_accumulation_steps": 6 // RANKS,
        "sampler": lambda data: TokenBudgetBatches([len(row) for row in data["input_ids"]], 24, seed=5, round_to=1),
    },
    "dispatched": {"rows": 22, "accelerator_config": {"dispatch_batches": True}},
}  # fmt: skip
# What must not come out alike on one process and on several; with dropout, whose masks go by the rank, it cannot.
MUTATIONS = {
    "stock": {"rows": 22, "trainer": Trainer},
    "grouped by each rank's own step": {**BY_LENGTH, "grouping": "by rank"},
    "stock grouping, dropout": {**BY_LENGTH, "grouping": "stock", "dropout": 0.1},
    "grouped by length, dropout": {**BY_LENGTH, "dropout": 0.1},
    "synchronised generators, dropout": {
        **BY_LENGTH, "train_sampling_strategy": "random", "dropout": 0.1,
        "accelerator_config": {"use_seedable_sampler": False},
    },
}  # fmt: skip
RESUMED = ("grouped by length, accumulation", "rebalanced", "budget of tokens")


@contextmanager
def replaced(module, name, value):
    """A mutation: `module.name` is `value` for a while."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def made(count, tokens, various):
    """The rows of a case; a block of six is one rank's of two, and holds a whole one's of three."""
    data = rows(count, tokens=tokens)
    if various == "lengths":
        lengths = torch.randint(2, 9, (count,), generator=torch.Generator().manual_seed(5)).tolist()
        for name in ("input_ids", "attention_mask"):
            cut = [row[:length] for row, length in zip(data[name], lengths, strict=True)]
            data = data.remove_columns(name).add_column(name, cut)
    elif various == "classes":
        data = data.map(lambda row, i: {"labels": i // 6 % 2}, with_indices=True)
    elif various == "ignored":  # of the first step in part, of the second altogether
        data = data.map(lambda row, i: {"labels": [-100] * 8} if i >= 6 else row, with_indices=True)
    return data


def collate(batch):
    """Tensors, padded to the longest row."""
    columns = {name: [torch.tensor(row[name]) for row in batch] for name in batch[0]}
    return {
        name: pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        for name, values in columns.items()
    }


def trainer_of(case, **more):
    """The case's trainer, and what it sees: of each step the loss, the rows and the classes of every rank's batch."""
    options = {**(CASES | MUTATIONS)[case], **more}
    trainer_class, tokens = options.pop("trainer", CustomTrainer), options.pop("tokens", False)
    num_labels, grouping = options.pop("num_labels", 2), options.pop("grouping", None)
    dropout = options.pop("dropout", 0.0)
    data = made(options.pop("rows"), tokens, options.pop("various", None))
    if num_labels == 1:
        data = data.cast_column("labels", Value("float64"))
    elif options.get("loss") is None and trainer_class is CustomTrainer:
        options["class_weights"] = WEIGHTS
    sampler = {"train_sampler": make(data)} if (make := options.pop("sampler", None)) else {}
    number = {tuple(row): i for i, row in enumerate(data["input_ids"])}
    assert len(number) == len(data), "rows are told apart by their tokens"
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    batch = GLOBAL_BATCH // options.get("gradient_accumulation_steps", 1)
    split = options.get("accelerator_config", {}).get("split_batches", False)
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": batch if split else batch // RANKS,
        "per_device_eval_batch_size": GLOBAL_BATCH if split else GLOBAL_BATCH // RANKS,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }
    seen = {}

    class Spy(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            kept = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            own = [number[tuple(ids[mask == 1].tolist())] for ids, mask in kept]
            step = seen.setdefault(self.state.global_step, {"loss": 0.0, "rows": [], "classes": []})
            step["loss"] += self.accelerator.reduce(loss.clone(), "mean").item()
            step["rows"] += gather_object([] if isinstance(inputs, UncountedBatch) else own)
            step["classes"] += gather_object([inputs["labels"].unique().tolist()])
            return loss

        def _get_train_sampler(self, *args):
            return (
                Trainer._get_train_sampler(self, *args) if grouping == "stock" else super()._get_train_sampler(*args)
            )

        def _rows_of_a_step(self):
            return self._train_batch_size if grouping == "by rank" else super()._rows_of_a_step()

    return Spy(
        model=tiny_model(dropout=dropout, dtype=torch.float64, tokens=tokens, num_labels=num_labels),
        args=CustomTrainingArguments(**{**arguments, **options}),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        **sampler,
    ), seen


def run(case):
    """One training and evaluation; what it came to."""
    trainer, seen = trainer_of(case)
    trainer.train()
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "world_size": trainer.args.world_size,
        "losses": [step["loss"] for step in seen.values()],
        "rows": [step["rows"] for step in seen.values()],
        "classes": [step["classes"] for step in seen.values()],
        "grad_norms": logged(trainer, "grad_norm"),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer),
    }


def run_resumed(case, folder):
    """The same training, taken up again in the middle of its second epoch."""
    trainer, _ = trainer_of(case, output_dir=str(folder), save_strategy="steps", save_steps=5)
    trainer.train()
    trainer, seen = trainer_of(case, output_dir=str(folder))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    return {"rows": [step["rows"] for step in seen.values()], "weights": weights(trainer)}


def refusal():
    """What is said where every rank is to read the whole stream; None on one process."""
    trainer, _ = trainer_of("stream, ranks without rows", accelerator_config={"dispatch_batches": False})
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return None


def weights(trainer):
    return nn.utils.parameters_to_vector(trainer.model.parameters()).tolist()


def run_accelerate_loop(case, accumulation=1):
    """The same by the loop over `accelerate.Accelerator`."""
    data = rows(CASES[case]["rows"])
    model = tiny_model(dropout=0.0, dtype=torch.float64)
    args = CustomTrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, max_steps=4, per_device_train_batch_size=GLOBAL_BATCH // RANKS // accumulation,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=GLOBAL_BATCH // RANKS,
        learning_rate=1e-2, report_to="none",
    )  # fmt: skip
    losses = []
    result = accelerate_loop.train(
        model,
        data,
        collate,
        loop_settings(args),
        eval_dataset=data,
        class_weights=torch.tensor(WEIGHTS, dtype=torch.float64),
        on_step=lambda **step: losses.append(step["loss"]),
        progress=False,
    )
    return {"losses": losses, "eval_loss": result.evaluations[-1]["loss"]}


def main():
    gc.freeze()  # every train() collects garbage, half of the time among the libraries' own objects
    out = Path(sys.argv[1])
    found = {case: run(case) for case in CASES | MUTATIONS}
    with replaced(exact_loss, "without_repeated_rows", lambda batch: batch):
        for case in ("ranks without rows", "stream, ranks without rows"):
            found[f"{case}: left in"] = run(case)
    found["resumed"] = {case: run_resumed(case, out.with_suffix(f".{case}")) for case in RESUMED}
    with replaced(samplers, "tell_epoch", lambda *_: None):
        found["resumed, epoch untold"] = {
            case: run_resumed(case, out.with_suffix(f".deaf {case}")) for case in RESUMED
        }
    found["refusal"] = refusal()
    found["accelerate loop"] = run_accelerate_loop("ranks without rows")
    found["accelerate loop, accumulation"] = run_accelerate_loop("ranks without rows", accumulation=2)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
