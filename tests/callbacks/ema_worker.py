"""The cases of `test_ema_on_ranks.py` on one engine: every rank writes what it saw.

    ema_worker.py OUT [deepspeed config]

The whole weights are put together at each step, by other means than the callback's: an oracle averages them.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, default_data_collator

from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.callbacks.ema import EMACallback
from trainer_ext.callbacks.shards import Shards, find_shards
from trainer_ext.checkpoints.manifest import write_manifest
from trainer_ext.engine import count_elements, full_parameters, runs_on

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS, SAVED, BATCH = 4, 2, 8


def whole(model):
    """Every weight in full, of any engine."""
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    return {name: tensor.double().clone() for name, tensor in full_parameters(model)}


class Watch(TrainerCallback):
    """The whole weights before training and after each step, and inside each evaluation."""

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(whole(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(whole(model))

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if "eval_loss" in logs:  # before on_evaluate
            self.evaluated.append(whole(model))


def trained(out, config, *, resume=None, watched=True, **more):
    """A training of four steps that evaluates and saves at each second one."""
    watch = Watch()
    args = CustomTrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, log_level="error", max_steps=STEPS,
        logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=BATCH // RANKS, eval_strategy="steps",
        eval_steps=SAVED, save_strategy="steps", save_steps=SAVED, per_device_eval_batch_size=BATCH // RANKS,
        dataloader_pin_memory=False, deepspeed=config, **more,
    )  # fmt: skip
    model = tiny_model(dropout=0.0, dtype=torch.float32 if config else torch.float64)
    elements = count_elements(model)
    trainer = (Trainer if config else CustomTrainer)(
        model=model, args=args, train_dataset=rows(24), eval_dataset=rows(11, seed=2),
        data_collator=default_data_collator, callbacks=[EMACallback(decay=0.5), *([watch] if watched else [])],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch, elements


def gap(found, expected):
    """The largest difference of any element; NaN where one is NaN."""
    assert found.keys() == expected.keys()
    return torch.stack([(found[name] - expected[name]).abs().max() for name in found]).max().item()


def oracle(steps):
    """The averages by their recurrence in float64, from whole weights."""
    found = dict(steps[0])
    for t, weights in enumerate(steps[1:], 1):
        d = min(0.5, (1 + t) / (10 + t))
        found = {name: d * found[name] + (1 - d) * weights[name] for name in found}
    return found


def gaps(trainer, watch):
    """Of the evaluations and the final model to the oracle's averages, and of these to the weights."""
    expected = [oracle(watch.steps[: step + 1]) for step in (SAVED, STEPS)]
    return {
        "evaluated": [gap(found, e) for found, e in zip(watch.evaluated, expected, strict=True)],
        "final": gap(whole(trainer.model), expected[1]),
        "weights": gap(watch.steps[-1], expected[1]),
    }


def refusal(out, config):
    """What is said where the file of the last rank is lost."""
    checkpoint = out / f"checkpoint-{SAVED}"
    torch.distributed.barrier()  # the other rank may still be reading it, as the best
    if RANK == 0:
        max(checkpoint.glob("ema*")).unlink()
        write_manifest(checkpoint)
    torch.distributed.barrier()
    try:
        trained(out, config, resume=str(checkpoint), watched=False)
    except ValueError as error:
        return str(error)
    return None


def mutated(out, config, whole_run):
    """What the gaps are where evaluations have the weights and not the averages; so nothing touches the weights."""
    own = Shards.__subclasses__()
    kept = [cls.write for cls in own]
    for cls in own:
        cls.write = lambda self, values: None
    try:
        trainer, watch, _ = trained(out, config)
        return {**gaps(trainer, watch), "untouched": gap(watch.steps[-1], whole_run.steps[-1])}
    finally:
        for cls, write in zip(own, kept, strict=True):
            cls.write = write


def main():
    out, config = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    trainer, watch, elements = trained(out / "whole", config)
    shards = find_shards(trainer.model, trainer.optimizer)
    final = whole(trainer.model)
    found = {
        "runs_on": asdict(runs_on(trainer, elements=elements)),
        "held": sum(weight.numel() for weight in shards.weights().values()) / elements,
        "files": sorted(path.name for path in (out / "whole" / f"checkpoint-{SAVED}").glob("ema*")),
        "losses": logged(trainer),
        "eval_losses": logged(trainer, "eval_loss"),
        "gaps": gaps(trainer, watch),
        "final_eval_loss": trainer.evaluate()["eval_loss"],
    }
    resumed, again, _ = trained(out / "whole", config, resume=str(out / "whole" / f"checkpoint-{SAVED}"))
    found["resumed"] = {
        "averages": gap(whole(resumed.model), final),
        "weights": gap(again.steps[-1], watch.steps[-1]),
        "taken up": gap(again.steps[0], watch.steps[SAVED]),
    }
    # It falls, and the highest is the first. Nothing is put together on the way, which changes what ZeRO-3 holds.
    best, _, _ = trained(
        out / "best", config, watched=False, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    found["best"] = {
        "step": best.state.best_global_step,
        "averages": gap(whole(best.model), oracle(watch.steps[: SAVED + 1])),
        "eval_losses": logged(best, "eval_loss"),
        "losses": logged(best),
    }
    found["refused"] = refusal(out / "best", config)
    found["mutated"] = mutated(out / "mutated", config, watch)
    (out / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
