"""Trainings with samples whose loss is NaN, under the engine that the environment asks for; each rank says what it saw."""

import hashlib
import os
import tempfile
from dataclasses import asdict
from types import SimpleNamespace

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from tests.callbacks.processes import settle_on_cpu
from tests.conftest import rows, tiny_model
from trainer_ext.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from trainer_ext.engine import base_optimizer, count_elements, full_parameters, runs_on, tensors_of

POISON = 4  # a token that no other row has
STEPS = 6
ROWS_OF_A_STEP = 16  # two micro-batches: with two ranks, rank 1 has the last 4 rows of each 8
BAD_STEPS = (1, 4, 5)
BAD_ROW = 13  # of each bad step: in its second micro-batch, on rank 1


class Digests(TrainerCallback):
    """After every step: the weights, what the optimizer keeps on this rank, and the rate of the next step."""

    def __init__(self):
        self.trainer, self.weights, self.states, self.rates, self.marked = None, [], [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.take()

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.marked.append(bool(optimizer.step_was_skipped))
        self.take()

    def take(self):
        optimizer = base_optimizer(self.trainer.optimizer)
        kept = [t for entry in optimizer.state.values() for t in tensors_of(entry)]
        self.weights.append(digest(tensor for _, tensor in full_parameters(self.trainer.model)))
        self.states.append(digest(getattr(t, "to_local", lambda t=t: t)() for t in kept))
        self.rates.append(optimizer.param_groups[0]["lr"])


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor).encode()
        )
    return found.hexdigest()


def data(*, without_bad_steps=False, bad_steps=BAD_STEPS, steps=STEPS):
    """Rows in order, of which those of the bad steps hold one that is poisoned, or are left out by hand."""
    table = rows(steps * ROWS_OF_A_STEP)
    bad = {(step - 1) * ROWS_OF_A_STEP + BAD_ROW for step in bad_steps}
    ids = [[POISON, *row[1:]] if i in bad else row for i, row in enumerate(table["input_ids"])]
    table = table.remove_columns("input_ids").add_column("input_ids", ids)
    kept = [i for i in range(len(table)) if i // ROWS_OF_A_STEP + 1 not in bad_steps]
    return table.select(kept) if without_bad_steps else table


def poisoned(kind):
    """A model whose embeddings, or whose loss alone, is NaN where a row begins with POISON; or that returns an object."""
    model = tiny_model(dropout=0.0)
    bad, at_embeddings = {}, kind in ("embeddings", "object")

    def embed(module, args, output):
        bad["rows"] = args[0][:, 0] == POISON
        return torch.where(bad["rows"][:, None, None], torch.nan, output) if at_embeddings else output

    def compute_loss(module, args, output):  # added to it, so that its gradient is finite
        output["loss"] = output["loss"] + torch.where(bad["rows"].any(), torch.nan, 0.0)
        return output

    model.get_input_embeddings().register_forward_hook(embed)
    if kind == "loss":
        model.register_forward_hook(compute_loss)
    if kind == "object":
        model.register_forward_hook(lambda module, args, output: SimpleNamespace(**output))
    return model


def train(
    guard, *, kind="embeddings", table=None, steps=STEPS, out=None, resume=None, trainer_class=Trainer, **options
):
    """One training, and everything that is asked about it."""
    digests = Digests()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        **{
            "output_dir": str(out or tempfile.mkdtemp()),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": steps,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "inverse_sqrt",  # another rate each step, whatever max_steps is
            "lr_scheduler_kwargs": {"timescale": 4},
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": ROWS_OF_A_STEP // 2 // ranks,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "log_level": "error",
            **options,
        }
    )
    model = poisoned(kind)
    elements = count_elements(model)
    run = trainer_class(
        model=model,
        args=args,
        train_dataset=table if table is not None else data(),
        data_collator=default_data_collator,
        callbacks=[*([guard] if guard else []), digests],
    )
    digests.trainer = run
    error = None
    try:
        run.train(resume_from_checkpoint=resume)
    except NonFiniteError as found:
        error = str(found)
        digests.take()
    return {
        "runs_on": asdict(runs_on(run, elements=elements)),
        "error": error,
        "weights": digests.weights,
        "states": digests.states,
        "rates": digests.rates,
        "marked": digests.marked,
        "skipped": guard and guard.skipped_steps,
        "logged": [entry.get("skipped_steps") for entry in run.state.log_history if "loss" in entry],
        "finite": all(bool(tensor.isfinite().all()) for _, tensor in full_parameters(run.model)),
    }


def run_all(deepspeed=None, *, only=("skipped", "by hand", "raised", "raised at the loss", "without")):
    """Left out by the guard, left out by hand, raised at two kinds of poison, and without a guard."""
    settle_on_cpu(deepspeed)
    options = {"deepspeed": deepspeed, "bf16": "bf16" in deepspeed} if deepspeed else {}
    late = data(bad_steps=(3,))
    by_hand = {"table": data(without_bad_steps=True), "steps": STEPS - len(BAD_STEPS)}
    runs = {
        "skipped": lambda: train(NonFiniteGuard("skip"), **options),
        "by hand": lambda: train(None, **by_hand, **options),
        "raised": lambda: train(NonFiniteGuard(), table=late, **options),
        "raised at the loss": lambda: train(NonFiniteGuard(), table=late, kind="loss", **options),
        "without": lambda: train(None, table=late, **options),
    }
    return {name: runs[name]() for name in only}


def refusal(deepspeed):
    """What is said where the engine cannot be told to leave a step out."""
    settle_on_cpu(deepspeed)
    try:
        train(NonFiniteGuard(), deepspeed=deepspeed)
    except ValueError as error:
        return str(error)
    return None
