"""Trainings that are resumed from each of their steps, and what they leave behind to compare.

A variant is a tiny training of three epochs, 20 rows in micro-batches of 3 with accumulation 2: seven micro-batches an
epoch, so that its fourth step is of one micro-batch with two rows.
"""

import gc
import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler
from transformers import PrinterCallback, Trainer, default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext import (
    ClassBalancedOrder,
    CustomTrainer,
    CustomTrainingArguments,
    EarlyStopping,
    EMACallback,
    GradualUnfreezing,
    GroupNorms,
    NonFiniteGuard,
    TokenBudgetBatches,
    WeightedOrder,
)

ROWS, STEPS, PER_EPOCH = 20, 12, 4
LENGTHS = [4 + 3 * (row % 5) for row in range(ROWS)]
WEIGHTS = [1.0 + row % 3 for row in range(ROWS)]
gc.freeze()  # every training collects garbage, and most of that time goes over what imports have made
TIMES = ("runtime", "per_second", "train_loss", "total_flos")  # of the clock, or of this call of train() alone


def numbered(count=ROWS, seed=1):
    """Rows whose first token is their number."""
    data = rows(count, seed=seed)
    ids = [[number, *tokens[1:]] for number, tokens in enumerate(data["input_ids"])]
    return data.remove_columns("input_ids").add_column("input_ids", ids)


def shuffled_tokens(row):
    """A row that Python, numpy and torch have each changed at random."""
    ids = list(row["input_ids"])
    ids[1 + random.randrange(7)] = random.randrange(40)
    ids[1 + np.random.randint(7)] = int(np.random.randint(40))
    ids[1 + int(torch.randint(7, ()))] = int(torch.randint(40, ()))
    return {**row, "input_ids": ids}


class Augmented(Dataset):
    def __init__(self):
        self.rows = numbered().to_list()

    def __len__(self):
        return ROWS

    def __getitem__(self, number):
        return shuffled_tokens(self.rows[number])


class Stream(IterableDataset):
    def __init__(self, times=1):
        self.rows = numbered().to_list() * times

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        part = slice(None) if worker is None else slice(worker.id, None, worker.num_workers)
        yield from map(shuffled_tokens, self.rows[part])


def with_transform():
    def change(batch):
        made = [shuffled_tokens({"input_ids": ids})["input_ids"] for ids in batch["input_ids"]]
        return {**batch, "input_ids": made}

    return numbered().with_transform(change)


def masked(features):
    batch = default_data_collator(features)
    batch["input_ids"][:, 1:][torch.rand(len(features), 7) < 0.3] = 3
    return batch


class MaskedByItsOwn:
    """A collator with a generator of its own, as `DataCollatorForLanguageModeling(seed=)` has."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, features):
        batch = default_data_collator(features)
        batch["input_ids"][:, 1:][torch.rand(len(features), 7, generator=self.generator) < 0.3] = 3
        return batch


@dataclass(frozen=True)
class Variant:
    """What differs from the plain training: functions that make it, and arguments."""

    data: object = numbered
    collator: object = default_data_collator
    sampler: object = None
    stock_sampler: object = None
    callbacks: object = list
    model: object = tiny_model
    stock: bool = True  # whether the stock class has it
    options: dict = field(default_factory=dict)


def workers(number, *, persistent=False):
    return {"dataloader_num_workers": number, "dataloader_persistent_workers": persistent}


EVALUATED = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "greater_is_better": False}
EACH = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "greater_is_better": False}
VARIANTS = {
    "dropout, shuffling": Variant(),
    "no dropout": Variant(model=lambda: tiny_model(dropout=0.0)),
    "in the dataset's order": Variant(options={"train_sampling_strategy": "sequential"}),
    "logged every 5 steps": Variant(options={"logging_steps": 5}),
    "logged every epoch": Variant(options={"logging_strategy": "epoch", "layerwise_lr_decay": 0.9}),
    "group_by_length": Variant(options={"train_sampling_strategy": "group_by_length"}),
    "batch_rebalance": Variant(options={"train_sampling_strategy": "batch_rebalance"}),
    "weighted": Variant(
        sampler=lambda: WeightedOrder(WEIGHTS, seed=42),
        stock_sampler=lambda: WeightedRandomSampler(WEIGHTS, ROWS),
    ),
    "class-balanced": Variant(
        sampler=lambda: ClassBalancedOrder(numbered()["labels"], seed=42),
        stock_sampler=lambda: WeightedRandomSampler([1 + 2.0 * y for y in numbered()["labels"]], ROWS),
    ),
    "token budget": Variant(
        sampler=lambda: TokenBudgetBatches(LENGTHS, 40, seed=42),
        stock_sampler=lambda: TokenBudgetBatches(LENGTHS, 40, seed=42),
    ),
    "random rows": Variant(data=Augmented),
    "random rows, 1 worker": Variant(data=Augmented, options=workers(1)),
    "random rows, 2 workers": Variant(data=Augmented, options=workers(2)),
    "random rows, 2 persistent workers": Variant(data=Augmented, options=workers(2, persistent=True)),
    "random transform of datasets": Variant(data=with_transform),
    "random collator": Variant(collator=masked),
    "random collator, 2 workers": Variant(collator=masked, options=workers(2)),
    "collator with its generator": Variant(collator=MaskedByItsOwn),
    "random stream": Variant(data=lambda: Stream(4), options={"max_steps": STEPS}),
    "random stream, read again": Variant(data=Stream, options={"max_steps": STEPS}),
    "random stream, 2 workers": Variant(data=lambda: Stream(4), options={"max_steps": STEPS, **workers(2)}),
    "evaluated every epoch": Variant(options=EVALUATED),
    "evaluated every 3 steps": Variant(options=EACH),
    "saved every epoch": Variant(options={**EVALUATED, "save_strategy": "epoch"}),
    "ends inside an epoch": Variant(options={**EVALUATED, "max_steps": 10}),
    "reduce_lr_on_plateau": Variant(
        options={**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    ),
    "cosine_with_restarts": Variant(
        options={"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    ),
    "constant_with_warmup": Variant(options={"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}),
    "EMACallback": Variant(callbacks=lambda: [EMACallback(0.5)], options=EVALUATED),
    "EarlyStopping": Variant(callbacks=lambda: [EarlyStopping(patience=2, min_delta=1.0)], options=EVALUATED),
    "GradualUnfreezing": Variant(callbacks=lambda: [GradualUnfreezing(every=3)]),
    "NonFiniteGuard, GroupNorms": Variant(callbacks=lambda: [NonFiniteGuard(), GroupNorms()]),
    "muon": Variant(stock=False, options={"optim": "muon"}),
    "bfloat16": Variant(model=lambda: tiny_model(dtype=torch.bfloat16)),
}


class Recorded:
    """Before a trainer class among the bases: the rows and the whole input of every step go to `seen`."""

    def training_step(self, model, inputs, *rest, **named):
        digest = hashlib.sha256(b"".join(inputs[name].numpy().tobytes() for name in sorted(inputs)))
        self.seen.setdefault(self.state.global_step, []).append(
            (inputs["input_ids"][:, 0].tolist(), digest.hexdigest())
        )
        return super().training_step(model, inputs, *rest, **named)


class Ours(Recorded, CustomTrainer):
    pass


class Stock(Recorded, Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return self.sampler or super()._get_train_sampler(train_dataset)


def make(cls, variant, out, **options):
    torch.manual_seed(7)
    defaults = {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "log_level": "error",
        "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 3, "learning_rate": 1e-2,
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    own = {"train_sampler": variant.sampler()} if cls is Ours and variant.sampler else {}
    collator = variant.collator
    made = cls(
        model=variant.model(),
        args=CustomTrainingArguments(**{**defaults, **variant.options, **options}),
        train_dataset=variant.data(),
        eval_dataset=numbered(9, seed=2) if "eval_strategy" in variant.options else None,
        data_collator=collator() if isinstance(collator, type) else collator,
        callbacks=variant.callbacks(),
        **own,
    )
    made.remove_callback(PrinterCallback)
    made.seen = {}
    if cls is Stock:
        made.sampler = variant.stock_sampler() if variant.stock_sampler else None
    return made


def left_behind(made):
    """What a run leaves: a digest of the weights, the rows of every step, and the log."""
    weights = hashlib.sha256(
        b"".join(value.contiguous().view(torch.uint8).numpy().tobytes() for value in made.model.state_dict().values())
    )
    log = [
        {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
        for entry in made.state.log_history
    ]
    return {"weights": weights.hexdigest(), "seen": made.seen, "log": log}


def whole(cls, variant, out):
    """The run that is not interrupted, which saves a checkpoint after every step."""
    saves = {"save_steps": 1, "save_strategy": variant.options.get("save_strategy", "steps")}
    made = make(cls, variant, out, **saves)
    made.train()
    return left_behind(made)


def resumed(cls, variant, out, step):
    """The run from the checkpoint of a step on."""
    made = make(cls, variant, f"{out}-resumed", save_strategy="no")
    folder = f"{out}/checkpoint-{step}"
    if cls is Stock:
        made.args.resume_from_checkpoint = folder
    random.random(), np.random.rand(), torch.rand(step)
    made.train(resume_from_checkpoint=folder)
    return left_behind(made)


def differences(expected, found, step):
    """The names of what a resumed run has otherwise than the whole run."""
    rest = {**expected, "seen": {at: rows for at, rows in expected["seen"].items() if at >= step}}
    return [name for name in rest if rest[name] != found[name]]
