"""Faults to be injected into real runs, and what a comparison has to say of each: step, quantity and cause.

A fault is a subclass of a trainer that does one thing wrong, or arguments that do. It is held against the manual loop, or
against another run where the loop has no such thing.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from tests.conftest import rows, tiny_model
from tests.test_manual_loop import train_manually
from trainer_ext import CustomTrainer, manual_loop
from trainer_ext.metrics import compute_metrics
from trainer_ext.parity import TrainerRecorder

# 22 rows: an epoch is a step of four micro-batches and one of two.
OPTIONS = {
    "num_train_epochs": 3,
    "max_steps": -1,
    "eval_strategy": "epoch",
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "class_weights": [1.0, 3.0],
    "weight_decay": 0.1,
    "learning_rate": 1e-3,
}
CLEAN = {
    "seed": 42,
    "optim": "adamw_torch_fused",
    "adam_epsilon": 1e-8,
    "adam_beta2": 0.999,
    "label_smoothing_factor": 0.0,
}
UNWEIGHTED = {"class_weights": None}
RESUMED_AT = 3


class MeanOfMeans(CustomTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class DroppedMicroBatch(CustomTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        kept = batches[: max(1, len(batches) - 1)]
        return kept, sum(self.configured_loss.denominator(batch["labels"]) for batch in kept)


class WrongNormaliser(CustomTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, total = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, total * 1.001


class NormaliserOfOneMicroBatch(CustomTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, total = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, total / len(batches)


def regrouped(change):
    """A trainer whose optimizer's groups are changed by `change(model, groups)`."""

    class Regrouped(CustomTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            change(self.model, optimizer.param_groups)
            return optimizer

    return Regrouped


def decay_on_bias(model, groups):
    bias = model.classifier.bias
    groups[1]["params"] = [p for p in groups[1]["params"] if p is not bias]
    groups[0]["params"].append(bias)


def decay_on_everything(model, groups):
    groups[1]["weight_decay"] = groups[0]["weight_decay"]


def embeddings_undecayed(model, groups):
    table = model.bert.embeddings.word_embeddings.weight
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not table]
    groups[1]["params"].append(table)


def faster_vectors(model, groups):
    groups[1]["lr"] *= 10


class NanAtStepTwo(CustomTrainer):
    loss_is_scaled_for_ga = True

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 1 else loss


def rescheduled(change):
    """A trainer whose `schedule.step` is what `change(schedule, step)` returns."""

    class Rescheduled(CustomTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            schedule = super().create_scheduler(num_training_steps, optimizer)
            change(schedule)
            return schedule

    return Rescheduled


def steps_four_times(schedule):
    step = schedule.step
    schedule.step = lambda *args: [step(*args) for _ in range(4)]


class ClipsLater(CustomTrainer):
    def _clip_grad_norm(self, model):
        return nn.utils.clip_grad_norm_(model.parameters(), float("inf"))


class ClipsEachMicroBatch(CustomTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        return loss


class KeepsGradients(CustomTrainer):
    def create_optimizer(self, model=None):
        self.model.zero_grad = lambda *args, **kwargs: None
        return super().create_optimizer(model)


class EvaluatesTrainMode(CustomTrainer):
    def prediction_step(self, model, *args, **kwargs):
        model.train()
        return super().prediction_step(model, *args, **kwargs)


class EvaluatesLastBatchTwice(CustomTrainer):
    def get_eval_dataloader(self, *args):
        loader = super().get_eval_dataloader(*args)
        batches = list(loader)
        return DataLoader([*batches, batches[-1]], batch_size=None)


class MeanOfEvalBatches(CustomTrainer):
    """As the stock class evaluates a weighted loss: the mean of its batches' means."""

    evaluation_loop = Trainer.evaluation_loop

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labels = inputs["labels"]
        with torch.no_grad():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))(logits, labels), logits, labels


class SameOrderEachEpoch(CustomTrainer):
    def get_train_dataloader(self):
        order = manual_loop.epoch_order(len(self.train_dataset), self.args.seed, 0)
        return DataLoader(self.train_dataset, self._train_batch_size, sampler=order, collate_fn=self.data_collator)


def collated(change):
    """A trainer whose batches are changed by `change(batch)`."""

    class Collated(CustomTrainer):
        def __init__(self, *args, data_collator, **kwargs):
            super().__init__(*args, data_collator=lambda some: change(data_collator(some)), **kwargs)

    return Collated


class WithoutSchedule(CustomTrainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        fresh = self.lr_scheduler.state_dict()
        super()._load_optimizer_and_scheduler(checkpoint)
        self.lr_scheduler.load_state_dict(fresh)
        for group, rate in zip(self.optimizer.param_groups, fresh["_last_lr"], strict=True):
            group["lr"] = rate


class WithoutOptimizerState(CustomTrainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        base = self.optimizer.optimizer if hasattr(self.optimizer, "optimizer") else self.optimizer
        base.state.clear()


class WithoutRng(CustomTrainer):
    def _load_rng_state(self, checkpoint):
        torch.manual_seed(1)


class WithoutWeights(CustomTrainer):
    def _load_from_checkpoint(self, *args, **kwargs):
        pass


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        expected: Step, quantity and cause that a comparison has to name.
        trainer: Who does it wrong.
        changes: Of the arguments.
        model: Of the model, as `tiny_model` takes it; `to` is a dtype to convert it to.
        both: Changes of arguments that the reference has too.
        reference: A trainer to hold it against; by default the manual loop.
        resumed: Whether the run is taken up again from a checkpoint after three steps.
        tokens: Whether tokens are classified.
    """

    expected: tuple[int, str, str]
    trainer: type[Trainer] = CustomTrainer
    changes: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    reference: type[Trainer] | None = None
    resumed: bool = False
    tokens: bool = False


def roll_rows(batch):
    return {**batch, "labels": batch["labels"].roll(1)}


def roll_tokens(batch):
    return {**batch, "labels": batch["labels"].roll(1, dims=1)}


FAULTS = {
    "the stock scaling under accumulation": Fault(
        (1, "loss", "the loss is not divided by the whole step's items"), Trainer, both=UNWEIGHTED),
    "a mean of means": Fault((1, "loss", "a mean of means"), MeanOfMeans),
    "labels shifted by a row": Fault((1, "labels", "labels are moved against their inputs"), collated(roll_rows)),
    "labels shifted by a token": Fault(
        (1, "labels", "other labels for the same inputs"), collated(roll_tokens), tokens=True),
    "the schedule stepped four times": Fault(
        (2, "learning_rate", "the schedule advances several steps a step"), rescheduled(steps_four_times),
        both={"num_train_epochs": 12}),
    "the schedule stepped before the optimizer": Fault(
        (1, "learning_rate", "the schedule is a step off"), rescheduled(lambda schedule: schedule.step())),
    "decay on everything": Fault(
        (0, "weight_decay[bert.embeddings.LayerNorm.weight]", "decay reaches 1-D parameters"),
        regrouped(decay_on_everything)),
    "decay on a bias": Fault(
        (0, "weight_decay[classifier.bias]", "decay reaches 1-D parameters"), regrouped(decay_on_bias)),
    "a matrix without decay": Fault(
        (0, "weight_decay[bert.embeddings.word_embeddings.weight]", "matrices without decay"),
        regrouped(embeddings_undecayed)),
    "another decay": Fault(
        (0, "weight_decay[bert.embeddings.word_embeddings.weight]", "another weight decay"),
        changes={"weight_decay": 0.11}),
    "a lost per-group rate": Fault(
        (1, "learning_rate", "a lost rate of a parameter group"), reference=regrouped(faster_vectors)),
    "learning rate x 1.01": Fault((1, "learning_rate", "another learning rate"), changes={"learning_rate": 1.01e-3}),
    "clipping inside the accumulation": Fault(
        (1, "grad_norm", "clipping inside the accumulation"), ClipsEachMicroBatch, both={"max_grad_norm": 0.01}),
    "no clipping": Fault(
        (1, "clipped_grad_norm", "clipping at another norm"), ClipsLater, both={"max_grad_norm": 0.01}),
    "gradients that are not cleared": Fault((2, "grad_norm", "gradients of the step before are kept"), KeepsGradients),
    "another seed": Fault(
        (1, "batch", "the same samples in another order: the sampler's seed"), changes={"seed": 43}),
    "a sampler not reseeded each epoch": Fault(
        (3, "batch", "the sampler is not reseeded for each epoch"), SameOrderEachEpoch),
    "a micro-batch dropped": Fault((1, "batch", "rows are left out"), DroppedMicroBatch),
    "the last batch dropped": Fault((2, "batch", "rows are left out"), changes={"dataloader_drop_last": True}),
    "a wrong normaliser": Fault((1, "denominator", "a wrong normaliser"), WrongNormaliser),
    "the normaliser of one micro-batch": Fault(
        (1, "denominator", "the denominator is that of one rank or one micro-batch"), NormaliserOfOneMicroBatch),
    "items counted for weights": Fault(
        (1, "denominator", "items are counted instead of class weights"), changes={"loss_reduction": "mean"}),
    "another head": Fault(
        (0, "initial_weights[classifier.weight]", "a new head, drawn with another seed"), model={"head_seed": 1}),
    "bfloat16 weights without float32 masters": Fault(
        (0, "initial_weights[bert.embeddings.LayerNorm.bias]", "weights of lower precision"),
        model={"to": torch.bfloat16}),
    "no dropout": Fault((1, "rng", "dropout is off in one of them"), model={"dropout": 0.0}),
    "other dropout": Fault(
        (1, "loss", "another loss"), model={"dropout": 0.2}),
    "label smoothing": Fault((1, "loss", "another loss"), changes={"label_smoothing_factor": 0.1}),
    "another beta": Fault((0, "optimizer[0.betas]", "another optimizer, or other settings"), changes={"adam_beta2": 0.99}),
    "a NaN at step 2": Fault((2, "loss", "the loss is not a number"), NanAtStepTwo, changes={"on_non_finite": "ignore"}),
    "evaluation in training mode": Fault(
        (2, "evaluation 1: loss", "evaluation in training mode"), EvaluatesTrainMode),
    "the last evaluation batch twice": Fault(
        (2, "evaluation 1: loss", "rows evaluated twice"), EvaluatesLastBatchTwice),
    "eval_loss as a mean of batch means": Fault(
        (2, "evaluation 1: loss", "eval_loss is a mean of batch means"), MeanOfEvalBatches),
    "a resume without the RNG state": Fault((4, "rng", "a resume without the RNG state"), WithoutRng, resumed=True),
    "a resume without the schedule": Fault(
        (4, "learning_rate", "a resume without the schedule"), WithoutSchedule, resumed=True),
    "a resume without the optimizer's state": Fault(
        (4, "evaluation 2: loss", "a resume without the optimizer's state"), WithoutOptimizerState, resumed=True),
    "a resume without the weights": Fault((4, "loss", "a resume without the weights"), WithoutWeights, resumed=True),
    "a resume with the data anew": Fault(
        (4, "batch", "a resume trained other rows"), changes={"ignore_data_skip": True}, resumed=True),
}  # fmt: skip


class StopAndSave(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == RESUMED_AT:
            control.should_save = control.should_training_stop = True


def model_of(changes, tokens):
    changes = dict(changes)
    head, dtype = changes.pop("head_seed", None), changes.pop("to", None)
    model = tiny_model(tokens=tokens, **changes)
    if head is not None:
        torch.manual_seed(head)
        nn.init.normal_(model.classifier.weight)
    return model if dtype is None else model.to(dtype)


def run_by_trainer(make: Callable[..., Any], fault: Fault, cls, changes, folder):
    """The trajectory of one run, and its trainer; `make` is the fixture `trainer`."""
    options = {**OPTIONS, **fault.both, **changes}
    options = {**options, "save_strategy": "no", "output_dir": str(folder / "out")}
    if cls is Trainer:
        options.pop("class_weights")

    def new(**more):
        data, evaluation = rows(tokens=fault.tokens), rows(13, tokens=fault.tokens)
        model = model_of(fault.model if cls is fault.trainer else {}, fault.tokens)
        return make(
            cls, model=model, train=data, evaluation=evaluation, compute_metrics=compute_metrics(), **options, **more
        )

    run = new(**({"callbacks": [StopAndSave()]} if fault.resumed else {}))
    initial = [parameter.detach().clone() for parameter in run.model.parameters()]
    recorder = TrainerRecorder(run, folder / "record")
    run.train()
    if fault.resumed:
        run = new()
        recorder = TrainerRecorder(run, folder / "record")
        run.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{RESUMED_AT}"))
    run.initial = initial
    return recorder.finish(), run


def run_both(make, fault: Fault, folder):
    """Reference and candidate, and the candidate's trainer."""
    candidate, run = run_by_trainer(make, fault, fault.trainer, fault.changes, folder / "candidate")
    if fault.reference is not None:
        reference, _ = run_by_trainer(make, fault, fault.reference, {}, folder / "reference")
    else:
        known = {field.name for field in dataclasses.fields(run.args)}
        options = {**OPTIONS, **CLEAN, "loss_reduction": "weighted_mean", "dataloader_drop_last": False, **fault.both}
        clean = dataclasses.replace(run.args, **{n: v for n, v in options.items() if n in known})
        reference = train_manually(manual_loop, clean, tokens=fault.tokens, dtype=torch.float32)
    return reference, candidate, run
