"""Comparison: the first difference is named, in the order in which things act, and NaN equals nothing."""

import dataclasses
import math

import pytest
import torch

from trainer_ext.parity import Evaluation, Step, Tolerance, Trajectory, assert_parity, compare
from trainer_ext.parity.digests import digests
from trainer_ext.parity.tolerance import BITWISE, ROUNDING, rounding_of


def trajectory(**changes):
    steps = [
        Step(i, f"{i:08x}", "0000000a", [8, 8], "rng", 16.0, 0.5 / i, 1.0 / i, [0.6 / i, 0.8 / i], [1e-3, 1e-3])
        for i in (1, 2, 3)
    ]
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    made = Trajectory(
        path="test",
        parameters={"a": ["float32", [4]], "b": ["float32", [2, 2]]},
        groups=[["b"], ["a"]],
        initial_weights={"a": "1", "b": "2"},
        optimizer={"class": "AdamW", "0.betas": [0.9, 0.999]},
        weight_decay={"a": 0.0, "b": 0.1},
        steps=steps,
        evaluations=[Evaluation(2, {"loss": 0.5, "accuracy": 0.75})],
        weights={2: {"a": "3", "b": "4"}},
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
        (with_step(2, rows="0000000f", labels="0000000f", loss=9.0), 2, "batch"),
        (with_step(2, labels="0000000f", loss=9.0), 2, "labels"),
        (with_step(1, sizes=[16]), 1, "micro_batches"),
        (with_step(2, rng="other", loss=9.0), 2, "rng"),
        (with_step(3, denominator=15.0, loss=9.0), 3, "denominator"),
        (with_step(3, denominator=math.nan), 3, "denominator"),
        (with_step(2, loss=math.nextafter(0.25, 1)), 2, "loss"),
        (with_step(2, loss=math.nan), 2, "loss"),
        (with_step(2, loss=math.inf), 2, "loss"),
        (with_step(1, grad_norm=1.0001), 1, "grad_norm"),
        (with_step(1, group_norms=[0.3, 0.4]), 1, "clipped_grad_norm"),
        (with_step(1, group_norms=[0.8, 0.6]), 1, "grad_norm of group 0"),
        (with_step(1, group_norms=[math.nan, 0.8]), 1, "clipped_grad_norm"),
        (trajectory(weights={2: {"a": "3", "b": "5"}}), 2, "weights[b]"),
        (with_step(1, learning_rates=[1e-3, 1.01e-3]), 1, "learning_rate"),
        (with_step(1, learning_rates=[1e-3]), 1, "learning_rate"),
        (trajectory(steps=trajectory().steps[:2]), 3, "steps"),
        (trajectory(optimizer_state={"a.exp_avg": "y"}), 3, "optimizer_state[a.exp_avg]"),
        (trajectory(optimizer_state={}), 3, "optimizer_state[a.exp_avg]"),
        (trajectory(evaluations=[Evaluation(2, {"loss": 0.5, "accuracy": 0.74})]), 2, "evaluation 1: accuracy"),
        (trajectory(evaluations=[Evaluation(2, {"loss": 0.5})]), 2, "evaluation 1: accuracy"),
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


def test_random_numbers_that_nobody_drew_are_no_difference():
    other = [dataclasses.replace(step, rng="other") for step in trajectory().steps]
    assert compare(trajectory(), trajectory(steps=other)).equal


def test_generators_that_parted_are_seen_where_both_runs_next_look():
    first, *later = (dataclasses.replace(step, rng=None) for step in trajectory().steps)
    ours = trajectory(steps=[first, *later[:-1], trajectory().steps[-1]])
    parted = dataclasses.replace(later[0], loss=9.0)
    theirs = trajectory(steps=[first, parted, *later[1:-1], dataclasses.replace(ours.steps[-1], rng="other")])
    found = compare(ours, theirs).first_difference
    assert (found.step, found.quantity, found.candidate) == (2, "rng", "other")
    assert compare(ours, trajectory(steps=[first, parted, *ours.steps[2:]])).first_difference.quantity == "loss"


def test_rates_are_compared_by_parameter_where_groups_differ():
    regrouped = trajectory(
        groups=[["a", "b"]],
        steps=[dataclasses.replace(s, learning_rates=[1e-3], group_norms=[1.0 / s.step]) for s in trajectory().steps],
    )
    assert compare(trajectory(), regrouped).equal
    slower = dataclasses.replace(regrouped, groups=[["b"]])
    first = compare(trajectory(), slower).first_difference
    assert (first.step, first.quantity, first.candidate) == (1, "learning_rate[a]", "absent")


def test_an_unfinished_run_is_compared_as_far_as_it_went():
    killed = trajectory(steps=trajectory().steps[:2], final_weights={}, tensors={}, finished=False)
    first = compare(trajectory(), killed).first_difference
    assert (first.step, first.quantity, first.reference, first.candidate) == (3, "steps", 3, 2)


def test_what_a_path_cannot_tell_is_no_difference():
    loop = trajectory(header={"unseen": ["evaluations"]}, evaluations=[])
    assert compare(trajectory(), loop).equal
    assert not compare(trajectory(), trajectory(evaluations=[])).equal


def test_assert_parity(tmp_path):
    assert_parity(trajectory(), trajectory(), tolerance=0)
    close = with_step(2, loss=0.25 * (1 + 5e-5))
    assert_parity(trajectory(), close)
    with pytest.raises(
        AssertionError, match=r"First difference at step 2, loss: reference 0.25, .*\n.*weights were changed"
    ):
        assert_parity(trajectory(), close, tolerance=1e-6)
    with pytest.raises(AssertionError, match="step 2, loss"):
        assert_parity(trajectory(), close, tolerance=0)
    with pytest.raises(AssertionError, match="nan"):
        assert_parity(trajectory(), with_step(2, loss=math.nan), tolerance=Tolerance("any", 1e9, 1e9))
    with pytest.raises(ValueError, match="no trajectory.jsonl"):
        assert_parity(trajectory(), tmp_path)


def test_the_coarser_dtype_sets_the_tolerance():
    def of(dtype):
        return trajectory(parameters={"a": [dtype, [4]]})

    assert rounding_of(of("float64"), of("float64")) == ROUNDING["float64"]
    assert rounding_of(of("float64"), of("float32")) == ROUNDING["float32"]
    assert rounding_of(of("bfloat16"), of("float32")) == ROUNDING["bfloat16"]
    assert rounding_of(of("float32"), of("float32"), 0.0) == BITWISE
    assert rounding_of(of("float32"), of("float32"), 0.5).relative == 0.5
