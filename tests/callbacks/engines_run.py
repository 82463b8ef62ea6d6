"""A training with all callbacks that measure, on each engine in turn: python engines_run.py OUT [ENGINE..]."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.callbacks.group_norms import GroupNorms
from trainer_ext.callbacks.run_summary import RunSummary
from trainer_ext.callbacks.throughput import Throughput
from trainer_ext.engine import runs_on
from trainer_ext.lr_finder import find_learning_rate

RATE, CLIP, STEPS, ROWS = 1e-2, 0.3, 3, 24
RULES = [{"match": "*.encoder.*", "lr_multiplier": 1.0, "name": "encoder"}]
AUTO = dict.fromkeys(("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
FSDP1 = {**FSDP2, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_USE_ORIG_PARAMS": "true"}
FSDP1.pop("FSDP_RESHARD_AFTER_FORWARD")


def zero(stage):
    return {**AUTO, "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": stage}}


# All is split, and small sub-groups have the optimizer step a group in parts.
ZERO3 = {"stage": 3, "sub_group_size": 500, "stage3_param_persistence_threshold": 0}
# Those on DeepSpeed last: it stays set up.
ENGINES = {
    "ddp": ({}, None),
    "fsdp2": (FSDP2, None),
    "fsdp1": (FSDP1, None),
    "zero0": ({}, zero(0)),
    "zero1": ({}, zero(1)),
    "zero2": ({}, zero(2)),
    "zero3": ({}, {**zero(3), "zero_optimization": ZERO3}),
}


def begin(engine):
    """Have this process's next trainer ask for `engine`."""
    for name in [*FSDP2, *FSDP1, "ACCELERATE_USE_DEEPSPEED"]:
        os.environ.pop(name, None)
    os.environ.update(ENGINES[engine][0])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_trainer(engine, out, *, callbacks):
    config = ENGINES[engine][1]
    args = CustomTrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=STEPS,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=CLIP, weight_decay=0.0, log_level="error",
        per_device_train_batch_size=4, train_sampling_strategy="sequential", deepspeed=config,
        param_group_rules=None if engine == "fsdp1" else RULES, use_cpu=True,
    )  # fmt: skip
    return CustomTrainer(
        model=tiny_model(dropout=0.0, attn_implementation="eager").to(torch.float32 if config else torch.float64),
        args=args,
        train_dataset=rows(ROWS),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def trained(engine, out):
    """One training, and what it logged; or how it was refused."""
    begin(engine)
    run = make_trainer(engine, out, callbacks=[Throughput(), GroupNorms(), RunSummary()])
    seen = {"finder": refusal(lambda: find_learning_rate(run, steps=20)) if engine != "ddp" else None}
    seen["refused"] = refusal(run.train)
    seen["log"] = [entry for entry in run.state.log_history if "loss" in entry]
    return seen | {"on": asdict(runs_on(run, elements=ELEMENTS))}


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


ELEMENTS = sum(p.numel() for p in tiny_model().parameters())


def main():
    out, engines = Path(sys.argv[1]), sys.argv[2:] or list(ENGINES)
    rank = f"rank{os.environ['RANK']}"
    seen = {engine: trained(engine, out / engine / rank) for engine in engines}
    (out / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
