"""Faults injected into real runs: each is caught, at the step and in the quantity where it acts."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.conftest import rows, tiny_model
from tests.test_manual_loop import train_manually
from trainer_ext import CustomTrainer, manual_loop
from trainer_ext.metrics import compute_metrics
from trainer_ext.parity import TrainerRecorder, compare

OPTIONS = {
    "num_train_epochs": 2,
    "max_steps": -1,
    "eval_strategy": "epoch",
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "class_weights": [1.0, 3.0],
    "weight_decay": 0.1,
}


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


class DecayOnBias(CustomTrainer):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        bias = self.model.classifier.bias
        decayed, others = (group["params"] for group in optimizer.param_groups)
        others[:] = [p for p in others if p is not bias]
        decayed.append(bias)
        return optimizer


class NanAtStepTwo(CustomTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 1 else loss

    loss_is_scaled_for_ga = True


class StepsTheScheduleTwice(CustomTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        schedule = super().create_scheduler(num_training_steps, optimizer)
        step = schedule.step
        schedule.step = lambda *args: (step(*args), step(*args))
        return schedule


class ClipsLater(CustomTrainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))


class EvaluatesTrainMode(CustomTrainer):
    def prediction_step(self, model, *args, **kwargs):
        model.train()
        return super().prediction_step(model, *args, **kwargs)


MUTATIONS = {
    "learning rate x 1.01": (CustomTrainer, {"learning_rate": 1.01e-3}, 1, "learning_rate"),
    "another seed": (CustomTrainer, {"seed": 43}, 1, "batch"),
    "a micro-batch dropped": (DroppedMicroBatch, {}, 1, "batch"),
    "a wrong normaliser": (WrongNormaliser, {}, 1, "denominator"),
    "a mean of means": (MeanOfMeans, {}, 1, "loss"),
    "decay on a bias": (DecayOnBias, {}, 0, "weight_decay[classifier.bias]"),
    "another decay": (
        CustomTrainer,
        {"weight_decay": 0.11},
        0,
        "weight_decay[bert.embeddings.word_embeddings.weight]",
    ),
    "a NaN at step 2": (NanAtStepTwo, {}, 2, "loss"),
    "another head": (
        CustomTrainer,
        {"model_seed": 1},
        0,
        "initial_weights[bert.embeddings.position_embeddings.weight]",
    ),
    "another epsilon": (CustomTrainer, {"adam_epsilon": 1e-4}, 0, "optimizer[0.eps]"),
    "another beta": (CustomTrainer, {"adam_beta2": 0.9}, 0, "optimizer[0.betas]"),
    "another optimizer": (CustomTrainer, {"optim": "sgd"}, 0, "optimizer[class]"),
    "the schedule stepped twice": (StepsTheScheduleTwice, {}, 2, "learning_rate"),
    "no clipping": (ClipsLater, {"max_grad_norm": 0.01}, 2, "loss"),
    "no dropout": (CustomTrainer, {"dropout": 0.0}, 1, "loss"),
    "evaluation in train mode": (EvaluatesTrainMode, {}, 3, "loss"),
    "other weights": (CustomTrainer, {"class_weights": [1.0, 2.9]}, 1, "denominator"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_is_caught_where_it_acts(trainer, mutation):
    cls, changes, step, quantity = MUTATIONS[mutation]
    options = {**OPTIONS, **changes}
    model = tiny_model(options.pop("model_seed", 0), dropout=options.pop("dropout", 0.1))
    run = trainer(cls, model=model, evaluation=rows(13), compute_metrics=compute_metrics(), **options)
    recorder = TrainerRecorder(run)
    run.train()
    candidate = recorder.finish()

    clip = changes.get("max_grad_norm", 1.0)
    defaults = {
        "seed": 42,
        "learning_rate": 1e-3,
        "optim": "adamw_torch_fused",
        "adam_epsilon": 1e-8,
        "adam_beta2": 0.999,
    }
    clean = dataclasses.replace(run.args, **OPTIONS, **defaults, max_grad_norm=clip)
    reference = train_manually(manual_loop, clean, tokens=False, dtype=torch.float32)
    first = compare(reference, candidate).first_difference
    assert first is not None
    assert (first.step, first.quantity) == (step, quantity)
