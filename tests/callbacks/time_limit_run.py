"""A training whose clock is set by hand, one for each rank, stopped by it and resumed."""

import os

from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from tests.callbacks.guard_run import digest
from tests.callbacks.processes import settle_on_cpu
from tests.conftest import rows, tiny_model
from trainer_ext.callbacks import time_limit
from trainer_ext.callbacks.time_limit import TimeLimit
from trainer_ext.engine import full_parameters

STEPS = 12
SECONDS = {0: 10.0, 1: 3.0}  # of a step, by rank


class Clock(TrainerCallback):
    """Goes on by so many seconds in each step, evaluation and save, and stands still otherwise."""

    def __init__(self, step, evaluation=0.0, save=0.0):
        self.now, self.step, self.evaluation, self.save = 1000.0, step, evaluation, save

    def __call__(self):
        return self.now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += self.step

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += self.evaluation

    def on_save(self, args, state, control, **kwargs):
        self.now += self.save


def train(out, limit, clock, *, resume=None, **options):
    """A stock `Trainer` under this clock."""
    time_limit.monotonic = clock
    args = TrainingArguments(
        **{
            "output_dir": str(out),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "dataloader_pin_memory": False,
            "log_level": "error",
            **options,
        }
    )
    run = Trainer(
        model=tiny_model(),
        args=args,
        train_dataset=rows(64),
        eval_dataset=rows(4),
        data_collator=default_data_collator,
        callbacks=[clock, *([limit] if limit else [])],
    )
    run.train(resume_from_checkpoint=resume)
    return run


def stop_and_resume(out, deepspeed=None):
    """Stopped by rank 0's clock, resumed, and trained in one go."""
    settle_on_cpu(deepspeed)
    options = {"deepspeed": deepspeed} if deepspeed else {}
    step = SECONDS[int(os.environ.get("RANK", "0"))]
    limit = TimeLimit(100, margin=15)
    stopped = train(out, limit, Clock(step), **options)
    found = {
        "engine": type(stopped.model_wrapped).__name__,
        "world_size": stopped.args.world_size,
        "stopped": (limit.stopped_at, stopped.state.global_step),
    }
    resumed = train(out, TimeLimit(100, margin=15), Clock(step), resume=str(out / "checkpoint-8"), **options)
    whole = train(out, None, Clock(step), **options)
    found["steps"] = (resumed.state.global_step, whole.state.global_step)
    found["weights"] = [
        digest(tensor for _, tensor in full_parameters(run.model)) for run in (stopped, resumed, whole)
    ]
    return found
