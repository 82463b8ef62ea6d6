"""Trainings that go on from one another's checkpoints on several engines, and what each holds and sees on the way."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, default_data_collator

from tests.callbacks.processes import DEEPSPEED, FSDP2, settle_on_cpu, zero
from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.drawn_orders import ClassBalancedOrder, WeightedOrder
from trainer_ext.engine import REHEARSING, base_optimizer, full_parameters, runs_on
from trainer_ext.repeated_rows import UncountedBatch
from trainer_ext.token_budget import TokenBudgetBatches

ROWS, STEP, STEPS = 22, 8, 9  # three steps an epoch, the last of six rows
LABELS = 3  # a bias that two ranks cannot share evenly
WHOLE = {**FSDP2, REHEARSING: "as a rehearsal, on the CPU"}
ENGINES = {  # what each asks for: environment, DeepSpeed config
    "plain": ({}, None),
    "fsdp2": (WHOLE, None),
    "fsdp2_sharded": ({**WHOLE, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, None),
    "zero1": (DEEPSPEED, zero(1)),
    "zero2": (DEEPSPEED, zero(2)),
    "zero3": (DEEPSPEED, zero(3)),
}
ORDERS = {
    "class-balanced": lambda data: ClassBalancedOrder(data["labels"], seed=3),
    "weighted": lambda data: WeightedOrder([1 + row % 3 for row in range(len(data))], seed=3),
    "token budget": lambda data: TokenBudgetBatches([8] * len(data), 32, seed=3),
}


class Watched(CustomTrainer):
    """Notes the rows of each step, and the state when the training begins and when it ends."""

    def __init__(self, until, **options):
        super().__init__(**options)
        self.seen = {}
        self.numbers = {tuple(row["input_ids"]): i for i, row in enumerate(rows(ROWS, num_labels=LABELS))}
        self.add_callback(StopAfter(until, self))

    def training_step(self, model, inputs, *args, **kwargs):
        if not isinstance(inputs, UncountedBatch):
            found = [self.numbers[tuple(row)] for row in inputs["input_ids"].tolist()]
            self.seen.setdefault(self.state.global_step + 1, []).extend(found)
        return super().training_step(model, inputs, *args, **kwargs)


class StopAfter(TrainerCallback):
    """Saves a checkpoint after a step, and ends the training."""

    def __init__(self, until, trainer):
        self.until, self.trainer = until, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            keep_state(self.trainer, Path(args.output_dir) / "begin.safetensors")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.until:
            keep_state(self.trainer, Path(args.output_dir) / "end.safetensors")
            control.should_save = control.should_training_stop = True


def begin(engine):
    """Have this process's next trainer ask for `engine`."""
    for name in [*WHOLE, *DEEPSPEED]:
        os.environ.pop(name, None)
    os.environ.update(ENGINES[engine][0])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make(engine, out, until, *, micro=None, model=None, order=None, **options):
    """A trainer whose steps have as many rows on any number of processes."""
    begin(engine)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro = micro or max(1, 4 // ranks)
    args = CustomTrainingArguments(**{
        "output_dir": str(out), "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": STEPS,
        "logging_steps": 1, "learning_rate": 1e-2, "log_level": "error", "use_cpu": True, "deepspeed": ENGINES[engine][1],
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": STEP // ranks // micro,
        "freeze": ["bert.embeddings.position_embeddings.*"], "dataloader_pin_memory": False, **options,
    })  # fmt: skip
    data = rows(ROWS, num_labels=LABELS)
    return Watched(
        until,
        model=model or tiny_model(num_labels=LABELS, dropout=0.0, attn_implementation="eager"),
        args=args,
        train_dataset=data,
        data_collator=default_data_collator,
        train_sampler=ORDERS[order](data) if order else None,
    )


def leg(engine, out, until, resume=None, **options):
    """Train up to a step, from the beginning or from a checkpoint; what this rank saw."""
    trainer = make(engine, out, until, **options)
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"on": asdict(runs_on(trainer)), "seen": trainer.seen, "losses": losses}


def legs(plans):
    """Several one after the other, as a rank."""
    settle_on_cpu(deepspeed=True)
    return [leg(engine, out, until, resume, **options) for engine, out, until, resume, options in plans]


def keep_state(trainer, path):
    """Write weights, moments and steps, whole, as the engine itself gives them: a collective."""
    found = {f"weight {name}": whole for name, whole in full_parameters(trainer.model)}
    own = getattr(trainer.optimizer, "optimizer", None)
    if hasattr(own, "_lazy_init_hp_params_optimizer_state"):
        own._hp_optimizer_states_linked = False  # DeepSpeed links after the first group's step, the others in vain
        own._lazy_init_hp_params_optimizer_state()
    state = base_optimizer(trainer.optimizer).state
    steps = {float(kept["step"]) for kept in state.values()}
    found["steps"] = torch.tensor(sorted(steps))
    for name, parameter in trainer.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            found[f"{key} {name}"] = full_moment(state, parameter, key)
    if trainer.args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}, path)


def full_moment(state, parameter, key):
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    kept = state[parameter][key]
    return kept.full_tensor() if hasattr(kept, "full_tensor") else kept


def differing(before, after):
    """The names of what is not to the bit the same in two files of `keep_state`."""
    a, b = load_file(before), load_file(after)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def seen_by_all(ranks):
    """The rows of each step, of all ranks together."""
    steps = {step for rank in ranks for step in rank["seen"]}
    return {step: sorted(row for rank in ranks for row in rank["seen"].get(step, [])) for step in sorted(steps)}
