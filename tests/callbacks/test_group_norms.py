"""The norms of each group against a plain loop, on one process; engines are in `test_on_engines.py`."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from tests.callbacks.plain_norms import norms_by_hand
from tests.conftest import rows, tiny_model
from trainer_ext.callbacks import group_norms
from trainer_ext.callbacks.group_norms import GroupNorms

RATE, CLIP = 1e-2, 0.3
# Without accumulation, in which the stock Trainer does not divide this model's loss.
STOCK = {
    "cls": Trainer,
    "arguments_class": TrainingArguments,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
OPTIONS = {
    "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "learning_rate": RATE,
    "max_grad_norm": CLIP, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 3,
}  # fmt: skip


def split(model):
    """Two groups, the head and the rest."""
    head = list(model.classifier.parameters())
    return [[p for p in model.parameters() if not any(p is own for own in head)], head]


def trained(trainer, *, names=("body", "head"), **options):
    model = tiny_model(dropout=0.0).double()
    groups = [
        {"params": group, **({"name": name} if name else {})} for group, name in zip(split(model), names, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
    run = trainer(
        **{**OPTIONS, **options}, model=model, train=rows(24), optimizers=(optimizer, None), callbacks=[GroupNorms()]
    )
    run.train()
    return run


def own(entry):
    return {name: value for name, value in entry.items() if name.startswith(("grad_norm_", "weight_n", "update_"))}


def measured(run):
    return [own(entry) for entry in run.state.log_history if own(entry)]


def expected(clip=CLIP, names=("body", "head")):
    model, data = tiny_model(dropout=0.0).double(), rows(24)
    batches = [default_data_collator([data[i] for i in range(first, first + 8)]) for first in (0, 8, 16)]
    steps = norms_by_hand(model, batches, split(model), rate=RATE, clip=clip)
    kinds = ("grad_norm", "weight_norm", "update_ratio")
    return [
        {
            f"{kind}_{name}": value
            for name, values in zip(names, step, strict=True)
            for kind, value in zip(kinds, values, strict=True)
        }
        for step in steps
    ]


@pytest.mark.parametrize(("clip", "options"), [(CLIP, {}), (0.0, {}), (CLIP, STOCK)], ids=["clip", "none", "stock"])
def test_the_norms_are_those_of_a_plain_loop(trainer, clip, options):
    run = trained(trainer, max_grad_norm=clip, **options)
    found, oracle = measured(run), expected(clip or math.inf)
    assert len(found) == 3
    for step, by_hand in zip(found, oracle, strict=True):
        assert step.keys() == by_hand.keys()
        assert all(step[name] == pytest.approx(by_hand[name], rel=1e-6) for name in by_hand)
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert any(norm > CLIP for norm in norms)
    for step, norm in zip(found, norms, strict=True):
        assert math.hypot(step["grad_norm_body"], step["grad_norm_head"]) == pytest.approx(norm, rel=1e-6)


def test_a_gradient_taken_after_clipping_is_seen(trainer, monkeypatch):
    monkeypatch.setattr(group_norms, "_clipping", lambda grad_norm, limit: 1.0)
    found, oracle = measured(trained(trainer)), expected()
    assert not all(
        step["grad_norm_head"] == pytest.approx(by_hand["grad_norm_head"], rel=1e-3)
        for step, by_hand in zip(found, oracle, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 2, "max_steps": 5}, [2, 4]),
        ({"logging_steps": 2, "max_steps": 5, "logging_first_step": True}, [1, 2, 4]),
        ({"logging_strategy": "epoch", "max_steps": 7}, [3, 6, 7]),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, [3]),
        ({"logging_strategy": "no", "max_steps": 3}, []),
        ({"logging_steps": 0.4, "max_steps": 5}, [2, 4]),
    ],
)
def test_only_logged_steps_are_measured(trainer, monkeypatch, options, steps):
    calls, real = [], group_norms._square_sum
    monkeypatch.setattr(group_norms, "_square_sum", lambda tensor: calls.append(1) or real(tensor))
    run = trained(trainer, **options)
    assert [entry["step"] for entry in run.state.log_history if own(entry)] == steps
    assert len(calls) == len(steps) * 4 * len(list(run.model.parameters()))


def test_names(trainer):
    assert measured(trained(trainer, names=(None, None)))[0].keys() == expected(names=("0", "1"))[0].keys()
    assert measured(trained(trainer, names=("a", "a")))[0].keys() == expected(names=("0_a", "1_a"))[0].keys()


def test_weights_that_begin_at_zero_have_no_ratio(trainer):
    model = tiny_model(dropout=0.0)
    torch.nn.init.zeros_(model.classifier.weight)
    head = [model.classifier.weight, model.classifier.bias]
    rest = [p for p in model.parameters() if not any(p is one for one in head)]
    optimizer = torch.optim.SGD([{"params": rest, "name": "body"}, {"params": head, "name": "head"}], lr=0.1)
    run = trainer(**OPTIONS, model=model, optimizers=(optimizer, None), callbacks=[GroupNorms()])
    run.train()
    first, second, _ = measured(run)
    assert "update_ratio_head" not in first
    assert first["weight_norm_head"] > 0
    assert second["update_ratio_head"] > 0
    assert first["update_ratio_body"] == 0  # a head of zeros passes no gradient on


def test_the_training_is_bitwise_the_same_and_the_hooks_go(trainer):
    plain = trainer(**OPTIONS)
    torch.manual_seed(1)
    plain.train()
    run = trainer(**OPTIONS, callbacks=[GroupNorms()])
    torch.manual_seed(1)
    run.train()
    assert len(measured(run)) == 3
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True))
    optimizer = run.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_resumed_run_measures_the_same(trainer, tmp_path):
    options = {**OPTIONS, "output_dir": str(tmp_path), "max_steps": 4}
    whole = trainer(**options, callbacks=[GroupNorms()], save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(**options, model=tiny_model(seed=9), callbacks=[GroupNorms()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert measured(resumed) == measured(whole)
    assert len(measured(whole)) == 4


def test_an_optimizer_of_another_kind(trainer):
    with pytest.raises(TypeError, match="watches a torch.optim.Optimizer, and object is none"):
        group_norms._check_engine(None, None, object())
