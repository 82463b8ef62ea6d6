"""A training whose metric is a table of steps, run in the test's process or in others."""

import os
import signal

from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext.callbacks.early_stopping import EarlyStopping

# The best is at step 3; with a patience of 4 the run ends at step 7. Kept at 5, it has counted 2.
VALUES = [0.9, 0.5, 0.3, 0.31, 0.4, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
PATIENCE = 4


class KilledBefore(TrainerCallback):
    """The process is gone, as a machine is."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(out, values, callbacks, **options):
    """A stock `Trainer` that evaluates every step: the metric `score` after step n is `values[n - 1]`."""
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": len(values),
        "per_device_train_batch_size": 4,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    data = options.pop("eval_dataset", rows(4))
    made = Trainer(
        model=tiny_model(),
        args=TrainingArguments(output_dir=str(out), **{**defaults, **options}),
        train_dataset=rows(64),
        eval_dataset=data,
        data_collator=default_data_collator,
        callbacks=callbacks,
        compute_metrics=lambda _: {"score": values[max(0, made.state.global_step - 1)]},
    )
    return made


def run_killed(out, step):
    """Gone before `step`."""
    callbacks = [EarlyStopping("score", PATIENCE, mode="min"), KilledBefore(step)]
    trainer_of(out, VALUES, callbacks, save_strategy="steps", save_steps=5).train()


def run_with_own_metric(out):
    """One of several ranks, each with another metric."""
    own = VALUES if os.environ["RANK"] == "0" else [1 - value for value in VALUES]
    stopping = EarlyStopping("score", PATIENCE, mode="min")
    run = trainer_of(out, own, [stopping])
    run.train()
    return {
        "engine": type(run.model_wrapped).__name__,
        "world_size": run.args.world_size,
        "metrics": [entry["eval_score"] for entry in run.state.log_history if "eval_score" in entry],
        "stopped": run.state.global_step,
        "best": stopping.best,
    }
