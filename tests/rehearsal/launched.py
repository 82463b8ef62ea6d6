"""A training that is over in a moment, with a fault by name: what the tests launch in the place of a user's script.

    LAUNCHER .. tests/rehearsal/launched.py --output_dir OUT [--trainer custom] [--fault NAME] [training arguments]

Every rank writes what it saw into OUT, as `seen0.json` and so on.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.engine import base_optimizer, full_parameters, parameter_groups, runs_on
from trainer_ext.shared_buffers import own_buffer

TRAINERS = {"stock": (Trainer, TrainingArguments), "custom": (CustomTrainer, CustomTrainingArguments)}


@dataclass
class Options:
    trainer: str = "stock"
    fault: str = "none"  # without_fsdp, without_training, breaks, one_rate


class Breaks(TrainerCallback):
    """Ends the run before its second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise RuntimeError("this script breaks")


class OneRate(TrainerCallback):
    """Takes from every parameter group the rate of its own."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate


FAULTS = {"breaks": Breaks, "one_rate": OneRate}


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **dropout))


def rows(count=64):
    ids = torch.randint(5, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def shared_buffer():
    """The name of DeepSpeed's buffers in shared memory, without the rank; None where there is none."""
    path = own_buffer()
    return str(path).removesuffix(os.environ["RANK"]) if path is not None and path.exists() else None


def seen(trainer, before):
    """What the trainer stands on, its parameter groups by the parameters' names, how far each parameter went at most, and
    what it logged."""
    optimizer = base_optimizer(trainer.optimizer)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}  # FSDP2 put others in place
    return {
        "shared_buffer": shared_buffer(),
        "group_names": [group.get("name") for group in optimizer.param_groups],
        "initial_rates": [group.get("initial_lr") for group in optimizer.param_groups],
        "moved": {name: float((w - before[name]).abs().max()) for name, w in full_parameters(trainer.model)},
        "runs_on": asdict(runs_on(trainer)),
        "groups": [sorted(names[id(p)] for p in group) for group in parameter_groups(trainer)],
        "weight_decay": [group["weight_decay"] for group in optimizer.param_groups],
        "schedule": type(getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)).__name__,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def main():
    if "without_fsdp" in sys.argv:  # before anything asks for it
        del os.environ["ACCELERATE_USE_FSDP"]
    arguments = TRAINERS["custom" if "custom" in sys.argv else "stock"][1]
    options, args = HfArgumentParser((Options, arguments)).parse_args_into_dataclasses()
    made = model()
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    trainer = TRAINERS[options.trainer][0](model=made, args=args, train_dataset=rows())
    if options.fault in FAULTS:
        trainer.add_callback(FAULTS[options.fault]())
    if options.fault != "without_training":
        trainer.train()
        path = Path(args.output_dir) / f"seen{args.process_index}.json"
        path.write_text(json.dumps(seen(trainer, before)))


if __name__ == "__main__":
    main()
