"""Comparison: the first difference is named, in the order in which things act, and NaN equals nothing."""

import dataclasses
import math

import pytest
import torch

from trainer_ext.parity import Recorder, Tolerance, Trajectory, compare
from trainer_ext.parity.trajectory import Step, digests, fingerprint, row_digests


def trajectory(**changes):
    steps = [Step(i, f"batch{i}", 2, 16.0, 0.5 / i, 1.0 / i, [1e-3, 1e-3]) for i in (1, 2, 3)]
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    made = Trajectory(
        path="test",
        initial_weights={"a": "1", "b": "2"},
        optimizer={"class": "AdamW", "0.betas": [0.9, 0.999]},
        weight_decay={"a": 0.0, "b": 0.1},
        steps=steps,
        evaluations=[{"loss": 0.5, "accuracy": 0.75}],
        final_weights=digests(tensors),
        optimizer_state={"a.exp_avg": "x"},
        tensors=tensors,
    )
    return dataclasses.replace(made, **changes)


def with_step(number, **changes):
    steps = [dataclasses.replace(s, **changes) if s.step == number else s for s in trajectory().steps]
    return trajectory(steps=steps)


def test_a_run_equals_itself():
    found = compare(trajectory(), trajectory())
    assert found.equal
    assert (found.loss_ratio, found.gradient_ratio) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("candidate", "step", "quantity"),
    [
        (trajectory(initial_weights={"a": "1", "b": "3"}), 0, "initial_weights[b]"),
        (trajectory(initial_weights={"a": "1"}), 0, "initial_weights[b]"),
        (trajectory(optimizer={"class": "SGD"}), 0, "optimizer[class]"),
        (trajectory(weight_decay={"a": 0.1, "b": 0.1}), 0, "weight_decay[a]"),
        (with_step(2, batch="other", loss=9.0), 2, "batch"),
        (with_step(1, micro_batches=1), 1, "micro_batches"),
        (with_step(3, denominator=15.0, loss=9.0), 3, "denominator"),
        (with_step(3, denominator=math.nan), 3, "denominator"),
        (with_step(2, loss=math.nextafter(0.25, 1)), 2, "loss"),
        (with_step(2, loss=math.nan), 2, "loss"),
        (with_step(2, loss=math.inf), 2, "loss"),
        (with_step(1, grad_norm=1.0001), 1, "grad_norm"),
        (with_step(1, learning_rates=[1e-3, 1.01e-3]), 1, "learning_rate"),
        (with_step(1, learning_rates=[1e-3]), 1, "learning_rate"),
        (trajectory(steps=trajectory().steps[:2]), 3, "steps"),
        (trajectory(optimizer_state={"a.exp_avg": "y"}), 3, "optimizer_state[a.exp_avg]"),
        (trajectory(optimizer_state={}), 3, "optimizer_state[a.exp_avg]"),
        (trajectory(evaluations=[{"loss": 0.5, "accuracy": 0.74}]), 3, "evaluation 1: accuracy"),
        (trajectory(evaluations=[{"loss": 0.5}]), 3, "evaluation 1: accuracy"),
        (trajectory(evaluations=[]), 3, "evaluations"),
    ],
)
def test_the_first_difference_is_named(candidate, step, quantity):
    first = compare(trajectory(), candidate).first_difference
    assert (first.step, first.quantity) == (step, quantity)


def test_weights_are_compared_and_measured():
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2) + 1e-3}
    candidate = trajectory(tensors=tensors, final_weights=digests(tensors))
    found = compare(trajectory(), candidate)
    assert found.first_difference.quantity == "weights[b]"
    assert found.max_abs_weight_difference == pytest.approx(1e-3, rel=1e-3)
    # three steps at 1e-3: a weight can have gone 3e-3, of which 1e-3 is a third
    assert compare(trajectory(), candidate, Tolerance("loose", relative=1e-6, weights=0.34)).equal
    assert not compare(trajectory(), candidate, Tolerance("tight", relative=1e-6, weights=0.33)).equal


def test_nan_never_passes():
    """Not even against the same NaN, and not under a tolerance."""
    nan = with_step(2, loss=math.nan)
    assert not compare(nan, nan).equal
    assert not compare(nan, nan, Tolerance("any", relative=1e9, weights=1e9)).equal
    tensors = {"a": torch.full((4,), math.nan), "b": torch.ones(2, 2)}
    broken = trajectory(tensors=tensors, final_weights=digests(tensors))
    assert compare(broken, broken).first_difference.quantity == "weights[a]"
    assert math.isnan(compare(trajectory(), broken).max_abs_weight_difference)
    assert math.isnan(compare(trajectory(), nan).max_abs_loss_difference)


def test_a_run_that_trained_nothing_is_not_equal():
    idle = trajectory()
    idle = dataclasses.replace(idle, initial_weights=idle.final_weights)
    assert compare(idle, idle).first_difference.quantity == "weights left unchanged by test and test"
    assert compare(trajectory(), idle).first_difference.quantity == "initial_weights[a]"
    warmup = [dataclasses.replace(step, learning_rates=[0.0]) for step in idle.steps]
    assert compare(*[dataclasses.replace(idle, steps=warmup)] * 2).equal
    empty = trajectory(steps=[])
    assert compare(empty, empty).first_difference.quantity == "steps"


def test_a_tolerance_is_relative():
    close = with_step(2, loss=0.25 * (1 + 5e-5))
    assert compare(trajectory(), close, Tolerance("t", relative=1e-4, weights=0.0)).equal
    infinite = with_step(2, loss=math.inf)
    assert not compare(infinite, trajectory(), Tolerance("t", relative=1e-4, weights=0.0)).equal
    assert not compare(trajectory(), close, Tolerance("t", relative=1e-5, weights=0.0)).equal


def fingerprint_of(window):
    return fingerprint(row_digests(batch) for batch in window)


def test_a_fingerprint_does_not_see_padding_or_splits_and_sees_all_else():
    def batch(rows, length):
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows))}

    one = batch([[5, 6], [7, 8, 9]], 3)
    padded = batch([[5, 6], [7, 8, 9]], 6)
    assert fingerprint_of([one]) == fingerprint_of([padded])
    halves = [{name: value[i : i + 1] for name, value in one.items()} for i in range(2)]
    assert fingerprint_of(halves) == fingerprint_of([one])
    assert fingerprint_of(halves[::-1]) != fingerprint_of([one])
    assert fingerprint_of([batch([[5, 6], [7, 8, 4]], 3)]) != fingerprint_of([one])
    assert fingerprint_of([{**one, "labels": torch.tensor([1, 1])}]) != fingerprint_of([one])
    assert fingerprint_of(halves[:1]) != fingerprint_of([one])

    def tokens(*labels):
        return {**batch([[5, 6, 7]], 4), "labels": torch.tensor([labels])}

    assert fingerprint_of([tokens(1, 1, 1, -100)]) != fingerprint_of([tokens(1, 1, 1, 1)])


def test_a_trajectory_survives_the_disk(tmp_path):
    made = trajectory()
    made.save(tmp_path / "run")
    read = Trajectory.load(tmp_path / "run")
    assert compare(made, read).equal
    assert read.steps == made.steps
    assert read.tensors.keys() == made.tensors.keys()


def test_another_schema_is_refused(tmp_path):
    trajectory().save(tmp_path)
    record = (tmp_path / "trajectory.json").read_text().replace('"schema": 2', '"schema": 99')
    (tmp_path / "trajectory.json").write_text(record)
    with pytest.raises(ValueError, match="schema 99"):
        Trajectory.load(tmp_path)


def test_digests_see_a_bit_a_shape_and_a_dtype():
    one = torch.tensor([1.0, 2.0])
    others = [torch.tensor([1.0, math.nextafter(2.0, 3.0)], dtype=torch.float64), one.double(), one[None], one + 1]
    found = {digests({"x": tensor})["x"] for tensor in [one, *others]}
    assert len(found) == 5
    assert Recorder("x").trajectory.steps == []
