"""The manual loop and CustomTrainer: the same bits, dropout on, for whole runs."""

import inspect
import random

import pytest
import torch
from transformers import default_data_collator

from tests.conftest import logged, rows, tiny_model
from trainer_ext import accelerate_loop, class_weights, manual_loop
from trainer_ext.loop_settings import LoopSettings, loop_settings
from trainer_ext.metrics import AccuracyAndF1, compute_metrics
from trainer_ext.parity import Recorder, TrainerRecorder, compare

CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "ragged": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
    "weights": {"class_weights": "balanced", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "count": {"class_weights": [1.0, 3.0], "loss_reduction": "mean", "gradient_accumulation_steps": 2},
    "decay and warmup": {"weight_decay": 0.3, "warmup_steps": 2, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    "warmup by share": {"warmup_steps": 0.4},
    "clipping": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "clipping off by -1": {"max_grad_norm": -1.0},
    "loop AdamW": {"optim": "adamw_torch"},
    "layer-wise rates": {"layerwise_lr_decay": 0.5, "head_lr_multiplier": 4.0, "weight_decay": 0.3},
    "muon": {"optim": "muon", "layerwise_lr_decay": 0.5, "weight_decay": 0.3},
    "smoothing": {"label_smoothing_factor": 0.1, "class_weights": [1.0, 3.0]},
    "part of an epoch": {"max_steps": 4},
    "another seed": {"seed": 7},
    "float64": {"dtype": torch.float64, "class_weights": [0.7, 3.1]},
    "tokens": {"tokens": True, "class_weights": "balanced", "gradient_accumulation_steps": 2},
}


def train_manually(loop, args, *, tokens, dtype):
    data, evaluation, model = rows(tokens=tokens), rows(13, tokens=tokens), tiny_model(tokens=tokens, dtype=dtype)
    labels = torch.tensor(data["labels"])
    weights = None if args.class_weights is None else class_weights(args.class_weights, 2, labels=labels)
    recorder = Recorder("loop")
    recorder.begin(model)
    recorder.watch()
    result = loop.train(
        model,
        data,
        default_data_collator,
        loop_settings(args),
        eval_dataset=evaluation,
        metric=AccuracyAndF1(),
        class_weights=weights,
        on_step=recorder.step,
        on_evaluate=recorder.evaluation,
        progress=False,
    )
    recorder.end(result.optimizer)
    return recorder.trajectory()


@pytest.mark.parametrize("loop", [manual_loop, accelerate_loop], ids=["manual", "accelerate"])
@pytest.mark.parametrize("case", CASES)
def test_bitwise_equal(trainer, loop, case):
    options = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", **CASES[case]}
    tokens, dtype = options.pop("tokens", False), options.pop("dtype", torch.float32)
    run = trainer(
        model=tiny_model(tokens=tokens, dtype=dtype),
        train=rows(tokens=tokens),
        evaluation=rows(13, tokens=tokens),
        compute_metrics=compute_metrics(),
        **options,
    )
    recorder = TrainerRecorder(run)
    run.train()
    candidate = recorder.finish()
    reference = train_manually(loop, run.args, tokens=tokens, dtype=dtype)

    found = compare(reference, candidate)
    assert found.first_difference is None
    assert (found.max_abs_loss_difference, found.max_abs_weight_difference) == (0.0, 0.0)
    assert len(reference.steps) >= 4
    assert len(reference.evaluations) == 2
    assert reference.initial_weights != reference.final_weights
    assert reference.optimizer_state


@pytest.mark.parametrize("loop", [manual_loop, accelerate_loop], ids=["manual", "accelerate"])
def test_bitwise_equal_on_random_data(trainer, loop):
    """Rows and a collator that draw from the global generators: both loops draw them by seed, epoch and row."""

    def change(batch):
        batch["input_ids"] = [[*ids[:-1], random.randrange(40)] for ids in batch["input_ids"]]
        return batch

    def collate(features):
        batch = default_data_collator(features)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.2] = 3
        return batch

    data, losses = rows().with_transform(change), []
    run = trainer(train=data, data_collator=collate, num_train_epochs=2, max_steps=-1)
    run.train()
    model = tiny_model()
    on_step = lambda **step: losses.append(step["loss"])  # noqa: E731
    loop.train(model, data, collate, loop_settings(run.args), on_step=on_step, progress=False)
    assert logged(run) == losses
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True)
    )


def test_dropout_is_on():
    """Without the trainer's random state a run differs: the equality above holds with masks drawn."""

    def losses(dropout):
        found = []
        manual_loop.train(
            tiny_model(dropout=dropout),
            rows(),
            default_data_collator,
            LoopSettings(max_steps=2),
            on_step=lambda **step: found.append(step["loss"]),
            progress=False,
        )
        return found

    assert losses(0.1) == losses(0.1)
    assert losses(0.1) != losses(0.0)


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    orders = [manual_loop.epoch_order(50, seed, epoch) for seed, epoch in [(42, 0), (42, 1), (43, 0), (42, 0)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[3]
    assert orders[1] == orders[2]  # the seed of an epoch is seed + epoch, as accelerate draws it
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("data", "epochs"), [([], 3), (rows(), -1), (rows(), 0)])
def test_nothing_to_train_is_an_error(data, epochs):
    with pytest.raises(ValueError, match="nothing to train"):
        manual_loop.train(tiny_model(), data, default_data_collator, LoopSettings(epochs=epochs), progress=False)


def test_no_label_at_all_is_zero():
    data = rows(8, tokens=True).remove_columns("labels").add_column("labels", [[-100] * 8] * 8)
    seen = []
    manual_loop.train(
        tiny_model(tokens=True),
        data,
        default_data_collator,
        LoopSettings(max_steps=1),
        on_step=lambda **step: seen.append((step["loss"], step["grad_norm"], step["denominator"])),
        progress=False,
    )
    assert seen == [(0.0, 0.0, 0.0)]


def test_what_the_reference_lacks_is_refused(arguments):
    with pytest.raises(ValueError, match=r"lr_scheduler_type=.*cosine.*; optim=.*sgd.*; loss=model"):
        loop_settings(arguments(lr_scheduler_type="cosine", optim="sgd", loss="model"))


def test_it_can_be_read_in_five_minutes():
    assert len(inspect.getsource(manual_loop).splitlines()) < 210
