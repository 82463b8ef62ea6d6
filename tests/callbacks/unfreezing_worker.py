"""Gradual unfreezing on however many ranks started this, and by hand in plain torch; every rank writes what it saw.

unfreezing_worker.py OUT [deepspeed config]
"""

import json
import os
import sys
import warnings
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, default_data_collator

from tests.conftest import SIZES, logged, rows
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.callbacks.gradual_unfreezing import GradualUnfreezing
from trainer_ext.engine import base_optimizer, count_elements, full_parameters, runs_on

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH, ROWS, STEPS = 8, 16, 9  # two steps an epoch, and four levels: all is trained from the fourth epoch on
RATE, DECAY, CLIP = 1e-2, 0.5, 0.05  # a norm of the whole gradient would be clipped otherwise
SAVED = 3  # in the middle of an epoch, when half of the levels are trained


def made():
    """Two blocks, no dropout, float64."""
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**SIZES, **options})).double()


def level(name):
    """What joins first is 0; by the names of BERT."""
    for place, part in enumerate(["layer.1.", "layer.0.", "embeddings"], 1):
        if part in name:
            return place
    assert "pooler" in name or "classifier" in name
    return 0


def joined_after(step, every=2, layers=1):
    """The highest level that is trained in the step after `step` steps."""
    return step // every * layers


def by_hand(every=2, layers=1):
    """Whole weights before and after each step, and the norms: an AdamW a level, made when the level joins."""
    model, data = made(), rows(ROWS)
    optimizers, seen, norms = {}, [snapshot(model)], []
    for step in range(STEPS):
        trained = [(n, p) for n, p in model.named_parameters() if level(n) <= joined_after(step, every, layers)]
        for place in {level(name) for name, _ in trained} - optimizers.keys():
            own = [(n, p) for n, p in trained if level(n) == place]
            decays = [{"params": [p for _, p in own if (p.ndim > 1) == many], "weight_decay": DECAY * many}
                      for many in (True, False)]  # fmt: skip
            optimizers[place] = torch.optim.AdamW([group for group in decays if group["params"]], lr=RATE)
        start = step * BATCH % ROWS
        batch = default_data_collator([data[i] for i in range(start, start + BATCH)])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, batch["labels"]), [p for _, p in trained])
        norm = torch.stack([(g**2).sum() for g in gradients]).sum().sqrt()
        for (_, parameter), gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient * min(1.0, CLIP / (norm.item() + 1e-6))
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            optimizer.step()
        norms.append(norm.item())
        seen.append(snapshot(model))
    return seen, norms


def snapshot(model):
    """Every weight in full, of any engine."""
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    return {name: tensor.double().clone() for name, tensor in full_parameters(model)}


class Watch(TrainerCallback):
    """Whole weights before training and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(snapshot(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(snapshot(model))


def run(out, callback, *, resume=None, cls=CustomTrainer, **more):
    """The same training by a trainer."""
    watch, model = Watch(), made()
    options = {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "log_level": "error",
        "max_steps": STEPS, "logging_steps": 1, "learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP,
        "per_device_train_batch_size": BATCH // RANKS, "save_strategy": "steps", "save_steps": SAVED,
        "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = cls(
        model=model, args=CustomTrainingArguments(**{**options, **more}), train_dataset=rows(ROWS),
        data_collator=default_data_collator, callbacks=[callback, watch],
    )  # fmt: skip
    trainer.elements = count_elements(model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.seen


def gap(found, expected):
    """The largest difference of any element; NaN where one is NaN."""
    assert found.keys() == expected.keys()
    return torch.stack([(found[name] - expected[name]).abs().max() for name in found]).max().item()


def moves(seen):
    """For each step the levels of which a weight changed, and whether all of a level's matrices did."""
    found = []
    for before, after in pairwise(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        levels = {level(name) for name in changed}
        whole = all(name in changed for name in before if level(name) in levels and before[name].ndim > 1)
        found.append([sorted(levels), whole])
    return found


def adam_steps(trainer):
    """How often the optimizer stepped the parameters of each level."""
    state = base_optimizer(trainer.optimizer).state
    named = trainer.model.named_parameters()
    steps = {(level(name), int(state[p]["step"])) for name, p in named if p in state}
    return sorted(steps)


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    out = Path(sys.argv[1])
    engine = {"deepspeed": sys.argv[2], "cls": Trainer} if len(sys.argv) > 2 else {}
    trainer, seen = run(out / "run", GradualUnfreezing(), **engine)
    expected, norms = by_hand()
    found = {
        "runs_on": asdict(runs_on(trainer, elements=trainer.elements)),
        "moves": moves(seen),
        "gaps": [gap(a, b) for a, b in zip(seen, expected, strict=True)],
        "norms": logged(trainer, "grad_norm"),
        "expected_norms": norms,
        "adam_steps": adam_steps(trainer),
    }
    resumed, again = run(out / "run", GradualUnfreezing(), resume=str(out / "run" / f"checkpoint-{SAVED}"))
    found["resumed"] = [gap(a, b) for a, b in zip(again, seen[SAVED:], strict=True)]
    found["resumed_adam_steps"] = adam_steps(resumed)
    (out / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
