"""The range test against a plain loop, and a training after it against one without it."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.callbacks.ranks import on_two_ranks
from tests.conftest import logged, tiny_model
from trainer_ext import as_it_was
from trainer_ext.lr_finder import Finding, find_learning_rate

STEPS = 24


class Linear(nn.Module):
    """Squared error of a linear map, in float64."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x=None, labels=None):
        return {"loss": ((x @ self.weight + self.bias - labels) ** 2).mean()}


def points():
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return [{"x": row, "labels": row.sum() + 1} for row in x]


def linear_trainer(arguments, **options):
    model, maximize = Linear(), options.pop("maximize", False)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=0.5, maximize=maximize)
    args = arguments(TrainingArguments, per_device_train_batch_size=8, max_grad_norm=0.0, **options)
    return Trainer(model=model, args=args, train_dataset=points(), optimizers=(optimizer, None))


def by_hand(rates, *, ratio):
    """The loss before each step of a plain loop, the bias at `ratio` times the rate."""
    x, y = (np.array([row[name].numpy() for row in points()]) for name in ("x", "labels"))
    weight, bias, losses = np.zeros(3), 0.0, []
    for rate in rates:
        error = x @ weight + bias - y
        losses.append(float((error**2).mean()))
        weight, bias = weight - rate * 2 * x.T @ error / 8, bias - ratio * rate * 2 * error.mean()
    return losses


def test_losses_and_rates_are_those_of_a_plain_loop(arguments):
    found = find_learning_rate(linear_trainer(arguments), low=1e-4, high=1e-1, steps=STEPS)
    expected = [1e-4 * 1000 ** (i / 23) for i in range(STEPS)]
    assert found.rates == pytest.approx(expected, rel=1e-12)
    assert found.losses == pytest.approx(by_hand(expected, ratio=0.5), rel=1e-6)  # the Trainer sums in float32
    assert found.losses != pytest.approx(by_hand(expected, ratio=1.0), rel=1e-3)  # groups that lose their ratio


def test_the_suggestion_is_the_steepest_descent(arguments):
    found = find_learning_rate(linear_trainer(arguments), low=1e-4, high=1e-1, steps=STEPS)
    smoothed = [
        sum(0.8 ** abs(i - j) * loss for j, loss in enumerate(found.losses))
        / sum(0.8 ** abs(i - j) for j in range(STEPS))
        for i in range(STEPS)
    ]
    assert found.smoothed == pytest.approx(smoothed, rel=1e-12)
    end = min(range(STEPS), key=smoothed.__getitem__)
    falls = {i: smoothed[i - 1] - smoothed[i + 1] for i in range(1, end)}  # rates rise evenly in their logarithm
    assert found.suggestion == found.rates[max(falls, key=falls.__getitem__)]


def test_it_ends_where_the_loss_diverges(arguments):
    found = find_learning_rate(linear_trainer(arguments), low=1e-2, high=1e4, steps=60)
    assert 5 < len(found.losses) < 60
    running, means = 0.0, []
    for i, loss in enumerate(found.losses):
        running = 0.8 * running + loss
        means.append(running * 0.2 / (1 - 0.8 ** (i + 1)))
    assert [mean > 4 * min(means[: i + 1]) for i, mean in enumerate(means)] == [False] * (len(means) - 1) + [True]


def test_a_loss_that_never_falls_has_no_suggestion(arguments):
    found = find_learning_rate(linear_trainer(arguments, maximize=True), low=1e-4, high=1e-1, steps=STEPS)
    assert found.losses == sorted(found.losses)
    assert found.suggestion is None


def test_a_loss_that_is_no_number(arguments):
    trainer = linear_trainer(arguments)
    with torch.no_grad():
        trainer.model.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the loss of the first step is no number"):
        find_learning_rate(trainer, steps=STEPS)


# Afterwards all is as it was


def generators():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def trained(trainer):
    torch.manual_seed(11)
    trainer.train()
    return logged(trainer), logged(trainer, "grad_norm"), {n: t.clone() for n, t in trainer.model.state_dict().items()}


def same(one, other):
    losses, norms, weights = one
    assert weights.keys() == other[2].keys()
    return (losses, norms) == other[:2] and all(torch.equal(weights[name], other[2][name]) for name in weights)


STOCK = {"cls": Trainer, "arguments_class": TrainingArguments}
CASES = {
    "custom": {"gradient_accumulation_steps": 2, "head_lr_multiplier": 4.0},
    "stock": STOCK,
    "own generators": {**STOCK, "accelerator_config": {"use_seedable_sampler": False}},
    "bfloat16": {**STOCK, "bf16": True},
    "model_init": {**STOCK, "model_init": lambda: tiny_model(seed=3)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_afterwards_is_the_one_without_it(trainer, case):
    options = {**CASES[case], "per_device_train_batch_size": 4, "max_steps": 7}
    plain = trained(trainer(**options))
    run = trainer(**options)
    torch.manual_seed(11)
    before = generators(), dict(vars(run))
    weights, of_model = {n: t.clone() for n, t in run.model.state_dict().items()}, dict(vars(run.model))
    found = find_learning_rate(run, low=1e-4, high=1.0, steps=20)
    assert len(set(found.losses)) > 10  # it trained
    assert generators() == before[0]
    assert dict(vars(run)) == before[1]
    assert run.args.max_steps == 7
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert vars(run.model) == of_model
    run.train()
    after = logged(run), logged(run, "grad_norm"), dict(run.model.state_dict())
    assert same(after, plain)


def test_without_the_generators_the_training_is_another(trainer, monkeypatch):
    plain = trained(trainer())
    monkeypatch.setattr(as_it_was, "keep_generators", lambda trainer: lambda: None)
    run = trainer()
    torch.manual_seed(11)
    find_learning_rate(run, steps=20)
    run.train()
    assert not same((logged(run), logged(run, "grad_norm"), dict(run.model.state_dict())), plain)


class NoteState(TrainerCallback):
    def __init__(self):
        self.begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1


def test_between_two_trainings(trainer):
    """The optimizer's moments, the schedule, the logs and the callbacks of the first one are still there."""
    note = NoteState()
    run = trainer(callbacks=[note], max_steps=4)
    run.train()
    optimizer = run.optimizer.optimizer
    moments = {p: {name: t.clone() for name, t in entry.items()} for p, entry in optimizer.state.items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    schedule, history, state = run.lr_scheduler.state_dict(), list(run.state.log_history), run.state
    weights = [p.clone() for p in run.model.parameters()]
    find_learning_rate(run, low=1e-3, high=1.0, steps=20)
    assert run.optimizer.optimizer is optimizer
    assert moments
    assert optimizer.state.keys() == moments.keys()
    for p, entry in moments.items():
        assert all(torch.equal(optimizer.state[p][name], tensor) for name, tensor in entry.items())
    now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    assert now == groups
    assert run.lr_scheduler.state_dict() == schedule
    assert run.state is state
    assert run.state.log_history == history
    assert note.begun == 1
    assert all(torch.equal(p, kept) for p, kept in zip(run.model.parameters(), weights, strict=True))


def test_a_collators_own_generator_and_an_error(trainer):
    class Collator:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)
            self.numpy = np.random.default_rng(5)
            self.python = random.Random(5)

        def __call__(self, rows):
            torch.rand(1, generator=self.generator), self.numpy.random(), self.python.random()
            raise RuntimeError("no such row")

    collator = Collator()
    run = trainer(data_collator=collator)
    with pytest.raises(RuntimeError, match="no such row"):
        find_learning_rate(run)
    assert run.optimizer is None
    fresh = Collator()
    assert torch.equal(collator.generator.get_state(), fresh.generator.get_state())
    assert collator.numpy.bit_generator.state == fresh.numpy.bit_generator.state
    assert collator.python.getstate() == fresh.python.getstate()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"low": 0.0}, "low=0.0 and high=1.0"),
        ({"low": 1.0, "high": 0.1}, "low below high"),
        ({"high": math.inf}, "high=inf"),
        ({"steps": 5}, "steps=5: a range test needs at least 20"),
    ],
)
def test_a_range_that_is_none(trainer, options, says):
    with pytest.raises(ValueError, match=says):
        find_learning_rate(trainer(), **options)
    with pytest.raises(ValueError, match="learning_rate=0.0 leaves no ratio"):
        find_learning_rate(trainer(learning_rate=0.0))


def test_the_picture(tmp_path):
    Finding([1e-3, 1e-2, 1e-1], [1.0, 0.5, 0.7], [0.9, 0.6, 0.7], 1e-2).plot(tmp_path / "found.svg")
    text = (tmp_path / "found.svg").read_text()
    assert "0.01 is suggested" in text
    assert ">learning rate<" in text
    Finding([1e-3, 1e-2], [1.0, 1.0], [1.0, 1.0], None).plot(tmp_path / "none.png")
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")


# Two ranks


def test_on_two_ranks(tmp_path):
    first, second = on_two_ranks("../lr_finder_ranks.py", tmp_path)
    assert (first["engine"], first["world_size"]) == ("DistributedDataParallel", 2)
    assert first["found"] == second["found"]
    assert first["losses"] == first["losses_without"]
    assert first["norms"] == first["norms_without"]
    assert first["weights"] == first["weights_without"] == second["weights"]
    assert first["losses"] != first["losses_other_generators"]
    assert first["found"]["losses"][0] == pytest.approx(first["first_loss"], rel=1e-6)
