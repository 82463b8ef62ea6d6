"""Causes that no run of `faults.py` provokes, and near misses: told from records that were changed by hand."""

import dataclasses
import math

import pytest

from tests.parity.faults import FAULTS
from tests.parity.test_comparison import trajectory, with_step
from trainer_ext.parity import Evaluation, compare, diagnose
from trainer_ext.parity.causes import CAUSES, UNKNOWN
from trainer_ext.parity.digests import digests
from trainer_ext.parity.tolerance import BITWISE, ROUNDING

TWO_ROWS = "0000000a0000000b"
LAST = trajectory().steps[-1].step


def every_step(**changes):
    return [dataclasses.replace(step, **changes) for step in trajectory().steps]


def scaled(name, by):
    return trajectory(steps=[dataclasses.replace(s, **{name: by * getattr(s, name)}) for s in trajectory().steps])


def evaluated(metrics, *, moved=0.0, **seen):
    """A run whose last evaluation, after its last step, and whose final weights are other ones."""
    tensors = {name: tensor + moved for name, tensor in trajectory().tensors.items()}
    found = [Evaluation(LAST, metrics, **seen)]
    return trajectory(evaluations=found, tensors=tensors, final_weights=digests(tensors))


RIGHT = {"loss": 0.5, "accuracy": 0.75}
CASES = {
    "a resume began the data anew": (
        trajectory(),
        trajectory(resumed_at=[1], steps=[trajectory().steps[0], *every_step(rows="00000001")[1:]]),
    ),
    "rows are counted twice": (
        trajectory(steps=every_step(rows=TWO_ROWS)),
        trajectory(steps=every_step(rows=TWO_ROWS + "0000000b")),
    ),
    "the same rows in another order within the step": (
        trajectory(steps=every_step(rows=TWO_ROWS)),
        trajectory(steps=every_step(rows="0000000b0000000a")),
    ),
    "other inputs: dataset, tokenizer or truncation": (trajectory(), trajectory(steps=every_step(rows="ffffffff"))),
    "the batch is split otherwise": (trajectory(), trajectory(steps=every_step(sizes=[16]))),
    "another checkpoint or another seed": (trajectory(), trajectory(initial_weights={"a": "x", "b": "y"})),
    "other dropout masks: another seed, or random numbers drawn besides": (
        trajectory(steps=[dataclasses.replace(s, rng=f"a{s.step}") for s in trajectory().steps]),
        trajectory(steps=[dataclasses.replace(s, rng=f"b{s.step}", loss=2 * s.loss) for s in trajectory().steps]),
    ),
    "bfloat16 arithmetic": (
        trajectory(),
        dataclasses.replace(scaled("loss", 1.05), parameters={"a": ["bfloat16", [4]]}),
    ),
    "weights were changed otherwise than by this step's gradient": (trajectory(), with_step(2, loss=0.26)),
    "the gradient is not a number": (trajectory(), with_step(2, grad_norm=math.nan)),
    "the gradient is scaled by the micro-batches": (trajectory(), scaled("grad_norm", 2.0)),
    "part of the gradient is missing or counted otherwise": (trajectory(), scaled("grad_norm", 0.9)),
    "rows left out of the evaluation": (
        evaluated(RIGHT, rows=13, expected=13),
        evaluated({**RIGHT, "accuracy": 0.5}, rows=12, expected=13),
    ),
    "the metrics are computed otherwise": (evaluated(RIGHT), evaluated({**RIGHT, "accuracy": 0.5})),
    "the evaluation after the last step is left out": (
        evaluated(RIGHT),
        trajectory(evaluations=[]),
    ),
    "evaluated after other steps": (
        evaluated(RIGHT),
        trajectory(evaluations=[dataclasses.replace(evaluated(RIGHT).evaluations[0], step=1)]),
    ),
    "one run takes fewer steps": (trajectory(), trajectory(steps=trajectory().steps[:2])),
    "nothing was trained": (trajectory(), trajectory(final_weights={"a": "1", "b": "2"})),
}


def test_with_the_faults_every_cause_is_provoked():
    from tests.parity import ddp_faults

    provoked = {fault.expected[2] for fault in FAULTS.values()} | set(CASES)
    provoked |= {expected[2] for _, expected in ddp_faults.RUNS.values() if expected}
    assert {cause.name for cause in CAUSES} <= provoked


@pytest.mark.parametrize("name", CASES)
def test_a_cause_is_told_from_the_numbers(name):
    reference, candidate = CASES[name]
    first = compare(reference, candidate, BITWISE).first_difference
    assert diagnose(reference, candidate, first).cause == name


def test_an_evaluation_is_not_blamed_for_other_weights():
    """Weights apart by rounding are the same ones; weights apart by more explain another eval_loss."""
    for moved, cause in ((1e-6, "eval_loss is a mean of batch means"), (1e-3, "weights were changed otherwise")):
        reference, candidate = evaluated(RIGHT), evaluated({**RIGHT, "loss": 0.6}, moved=moved)
        first = compare(reference, candidate, ROUNDING["float32"]).first_difference
        assert first.quantity == "evaluation 1: loss"
        assert diagnose(reference, candidate, first).cause.startswith(cause)


@pytest.mark.parametrize(
    ("ratio", "cause"),
    [(2.0, "the loss is not divided by the whole step's items"), (2.02, "a mean of means"), (1.01, "a mean of means")],
)
def test_a_ratio_is_taken_for_a_number_only_where_it_is_one(ratio, cause):
    candidate = dataclasses.replace(scaled("loss", ratio))
    candidate.steps = [dataclasses.replace(step, denominator=None) for step in candidate.steps]
    first = compare(trajectory(), candidate, ROUNDING["float32"]).first_difference
    assert diagnose(trajectory(), candidate, first).cause == cause


def test_what_has_no_sign_is_unknown():
    candidate = trajectory(final_weights={"a": "x", "b": "2"}, tensors={})
    first = compare(trajectory(), candidate).first_difference
    found = diagnose(trajectory(), candidate, first)
    assert (found.cause, found.known) == (UNKNOWN, "")
    assert "No known cause" in str(found)


def test_the_arguments_that_differ_are_named():
    def of(**arguments):
        return trajectory(header={"arguments": {"seed": 1, "output_dir": "a", "optim": "x", **arguments}})

    reference, candidate = of(), of(seed=2, output_dir="b")
    candidate.steps = every_step(loss=9.0)
    found = diagnose(reference, candidate, compare(reference, candidate).first_difference)
    assert found.arguments == ("seed: 1 / 2",)
    assert "Arguments that differ: seed: 1 / 2." in str(found)
