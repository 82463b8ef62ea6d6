"""Clean and faulty runs on two ranks, each recorded into a folder of its own; one launch for all of them.

torchrun --nproc_per_node 2 -m tests.parity.ddp_faults FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.parity import Recorder, TrainerRecorder, Trajectory
from trainer_ext.rehearsal.processes import run_launch

OPTIONS = {
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "gradient_accumulation_steps": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "eval_strategy": "epoch",
    "dataloader_pin_memory": False,
    "log_level": "error",
}
ROWS = 32  # two steps of 16 an epoch


class OneRankSeed(CustomTrainer):
    """Rank 1 shuffles by another seed."""

    def get_train_dataloader(self):
        return shuffled(self, seed=self.args.seed + self.args.process_index, rank=self.args.process_index)


class AllRanksAlike(CustomTrainer):
    """Nobody shards the data."""

    def get_train_dataloader(self):
        return shuffled(self, seed=self.args.seed, rank=0)


def shuffled(trainer, *, seed, rank):
    order = manual_loop.epoch_order(ROWS, seed, 0)
    own = [row for start in range(4 * rank, ROWS, 8) for row in order[start : start + 4]]
    return DataLoader(trainer.train_dataset, 4, sampler=own, collate_fn=default_data_collator)


class AveragedTwice(CustomTrainer):
    """The gradient is divided by the ranks once more."""

    def _clip_grad_norm(self, model):
        for parameter in model.parameters():
            parameter.grad /= dist.get_world_size()
        return super()._clip_grad_norm(model)


class NotAveraged(CustomTrainer):
    """The gradients are added up."""

    def _clip_grad_norm(self, model):
        for parameter in model.parameters():
            parameter.grad *= dist.get_world_size()
        return super()._clip_grad_norm(model)


class SchedulePerRank(CustomTrainer):
    """As accelerate steps a schedule that it was given to prepare."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        schedule = super().create_scheduler(num_training_steps, optimizer)
        step = schedule.step
        schedule.step = lambda *args: [step(*args) for _ in range(dist.get_world_size())]
        return schedule


RUNS = {
    "clean": (CustomTrainer, None),
    "the stock scaling under ranks": (Trainer, (1, "loss", "the loss is not divided by the whole step's items")),
    "one rank with another seed": (OneRankSeed, (1, "batch", "one rank has a seed of its own")),
    "the same rows on every rank": (AllRanksAlike, (1, "batch", "every rank trains the same rows")),
    "a gradient averaged twice": (
        AveragedTwice,
        (1, "grad_norm", "gradients averaged over the ranks twice, or not at all"),
    ),
    "a gradient added up": (NotAveraged, (1, "grad_norm", "gradients averaged over the ranks twice, or not at all")),
    "a schedule stepped on each rank": (
        SchedulePerRank,
        (2, "learning_rate", "the schedule advances several steps a step"),
    ),
}


def arguments(folder, **options):
    return CustomTrainingArguments(output_dir=str(folder / "out"), **{**OPTIONS, **options})


def launched(folder: Path) -> dict[str, Trajectory]:
    """The runs of two ranks by name, and as `reference` the manual loop's with the same rows to a step."""
    on_two_ranks("tests.parity.ddp_faults", folder)
    return {name: Trajectory.load(folder / name) for name in RUNS} | {"reference": whole_batch(folder)}


def on_two_ranks(module: str, folder: Path) -> None:
    """Run a module, which is told the folder, in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc_per_node", "2", "-m", module, str(folder)]
    code, output = run_launch(words, folder / "log", processes=2, timeout=600)
    assert code == 0, output[-3000:]


def whole_batch(folder: Path) -> Trajectory:
    """The manual loop's run, each step's rows in one batch."""
    args = arguments(folder, per_device_train_batch_size=16)
    args.gradient_accumulation_steps = 1
    model, recorder = tiny_model(dropout=0.0), Recorder("manual loop")
    recorder.begin(model)
    recorder.watch()
    result = manual_loop.train(
        model,
        rows(ROWS),
        default_data_collator,
        loop_settings(args),
        eval_dataset=rows(12),
        on_step=recorder.step,
        on_evaluate=recorder.evaluation,
        progress=False,
    )
    recorder.end(result.optimizer)
    return recorder.trajectory()


def main(folder):
    for name, (trainer_class, _) in RUNS.items():
        trainer = trainer_class(
            model=tiny_model(dropout=0.0),
            args=arguments(folder, per_device_train_batch_size=4),
            train_dataset=rows(ROWS),
            eval_dataset=rows(12),
            data_collator=default_data_collator,
        )
        recorder = TrainerRecorder(trainer, folder / name)
        trainer.train()
        trajectory = recorder.finish()
        assert trajectory.runs_on["engine"] == "DistributedDataParallel", trajectory.runs_on
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
