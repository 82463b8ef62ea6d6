"""Faults injected into real runs: each is caught at the step and in the quantity where it acts, with its cause named."""

from pathlib import Path

import pytest

from tests.parity import ddp_faults
from tests.parity.faults import FAULTS, RESUMED_AT, Fault, run_both
from trainer_ext.parity import compare, diagnose
from trainer_ext.parity.causes import CAUSES
from trainer_ext.parity.tolerance import ROUNDING


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # a fault is just that
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(trainer, tmp_path, name):
    fault = FAULTS[name]
    reference, candidate, _ = run_both(trainer, fault, tmp_path)
    first = compare(reference, candidate).first_difference
    assert first is not None
    assert (first.step, first.quantity, diagnose(reference, candidate, first).cause) == fault.expected


def test_a_resume_without_a_fault_is_the_same_run(trainer, tmp_path):
    """Stopped within an epoch, where the trainer evaluates once more than it does in one go."""
    reference, candidate, _ = run_both(trainer, Fault((0, "", ""), resumed=True), tmp_path)
    assert [evaluation.step for evaluation in reference.evaluations] == [2, 4, 6]
    assert [evaluation.step for evaluation in candidate.evaluations] == [2, RESUMED_AT, 4, 6]
    found = compare(reference, candidate)
    assert found.equal
    assert found.max_relative_metric_difference == 0.0


def test_evaluations_after_other_steps_are_not_held_against_each_other(trainer, tmp_path):
    fault = Fault((0, "", ""), changes={"eval_strategy": "steps", "eval_steps": 3})
    reference, candidate, _ = run_both(trainer, fault, tmp_path)
    first = compare(reference, candidate).first_difference
    assert (first.step, first.quantity) == (2, "evaluations")
    assert (first.reference, first.candidate) == ("after step 2", "after step 3")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return ddp_faults.launched(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ddp_faults.RUNS)
def test_a_fault_of_several_ranks_is_caught_and_named(ranks, name):
    expected = ddp_faults.RUNS[name][1]
    assert ranks[name].world_size == 2
    first = compare(ranks["reference"], ranks[name], ROUNDING["float32"], same_split=False).first_difference
    if expected is None:
        assert first is None
    else:
        found = (first.step, first.quantity, diagnose(ranks["reference"], ranks[name], first).cause)
        assert found == expected


def test_every_cause_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    for cause in CAUSES:
        assert f"| {cause.name} | [" in page
        assert cause.known in page
