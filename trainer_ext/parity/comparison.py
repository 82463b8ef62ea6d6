"""Two trajectories held against each other: the first difference, and how far they lie apart in all."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer_ext.parity.differences import (
    Difference,
    common_steps,
    differences,
    evaluations,
    tensor_gap,
    way,
    where,
    without_gradient,
)
from trainer_ext.parity.tolerance import BITWISE, Tolerance, rounding_of
from trainer_ext.parity.trajectory import Trajectory


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        first_difference: None where the trajectories are equal.
        max_abs_loss_difference: Over all steps both took; NaN where a loss was not finite.
        max_abs_weight_difference: Over all elements of the final weights; NaN as above.
        loss_ratio: Candidate over reference at the first step.
        gradient_ratio: The same for the gradient's norm.
        max_relative_loss_difference: Over all steps both took, of the reference's; NaN as above.
        max_relative_gradient_difference: The same for the gradient's norm.
        max_relative_metric_difference: Of the evaluations' losses.
    """

    first_difference: Difference | None
    max_abs_loss_difference: float
    max_abs_weight_difference: float
    loss_ratio: float
    gradient_ratio: float
    max_relative_loss_difference: float = 0.0
    max_relative_gradient_difference: float = 0.0
    max_relative_metric_difference: float = 0.0

    @property
    def equal(self) -> bool:
        return self.first_difference is None


def compare(
    reference: Trajectory,
    candidate: Trajectory,
    tolerance: Tolerance = BITWISE,
    *,
    same_split: bool = True,
) -> Comparison:
    """Hold `candidate` against `reference`.

    Args:
        reference: What is taken to be right.
        candidate: What is tested.
        tolerance: For numbers that went through arithmetic; what was put in must be equal in any case.
        same_split: Whether a step is to come in the same micro-batches in both.
    """
    first = next(differences(reference, candidate, tolerance, same_split), None)
    pairs = common_steps(reference, candidate)
    one = pairs[0] if pairs else None
    return Comparison(
        first_difference=first,
        max_abs_loss_difference=_largest(abs(b.loss - a.loss) for a, b in pairs),
        max_abs_weight_difference=_weight_difference(reference, candidate),
        loss_ratio=_ratio(one[1].loss, one[0].loss) if one else math.nan,
        gradient_ratio=_ratio(one[1].grad_norm, one[0].grad_norm) if one else math.nan,
        max_relative_loss_difference=_largest(_relative(a.loss, b.loss) for a, b in pairs),
        max_relative_gradient_difference=_largest(
            _relative(a.grad_norm, b.grad_norm)
            for a, b in pairs
            if a.grad_norm is not None and b.grad_norm is not None
        ),
        max_relative_metric_difference=_largest(
            _relative(a.metrics["loss"], b.metrics["loss"])
            for a, b in zip(*evaluations(reference, candidate), strict=False)
            if "loss" in a.metrics and "loss" in b.metrics
        ),
    )


def assert_parity(
    a: Trajectory | Path | str, b: Trajectory | Path | str, *, tolerance: Tolerance | float | None = None
) -> None:
    """Raise where `b` is not the run that `a` is; for tests.

    Args:
        a: The reference: a trajectory, or the folder of a record.
        b: The candidate.
        tolerance: A `Tolerance`, or a number for its relative part (0 for the same bits); by default that of the
            weights' dtype, in which runs may differ by the order of summation.

    Raises:
        AssertionError: They differ; the message names the first difference and its likely cause.
        ValueError: A folder holds no record.
    """
    from trainer_ext.parity.causes import diagnose

    reference, candidate = (one if isinstance(one, Trajectory) else Trajectory.load(one) for one in (a, b))
    if not isinstance(tolerance, Tolerance):
        tolerance = rounding_of(reference, candidate, tolerance)
    first = compare(reference, candidate, tolerance, same_split=tolerance.bitwise).first_difference
    if first is not None:
        raise AssertionError(f"{where(first)}.\n{diagnose(reference, candidate, first)}")


def weight_share(reference: Trajectory, candidate: Trajectory) -> float:
    """The largest difference of an element of the final weights, as a share of the way that a weight can have gone;
    without the parameters that no gradient moves."""
    idle = without_gradient(reference)
    kept = [name for name in reference.tensors if name not in idle]
    gap = _largest(tensor_gap(reference.tensors[name], candidate.tensors[name]) for name in kept)
    return gap / way(reference) if way(reference) else gap


def _weight_difference(a: Trajectory, b: Trajectory) -> float:
    if a.tensors.keys() != b.tensors.keys():
        return math.nan
    return _largest(tensor_gap(a.tensors[name], b.tensors[name]) for name in a.tensors)


def _largest(values: Iterator[float]) -> float:
    """The maximum; NaN where any is NaN, which `max` may lose."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def _ratio(candidate: float | None, reference: float | None) -> float:
    return candidate / reference if candidate is not None and reference else math.nan


def _relative(reference: float, candidate: float) -> float:
    return abs(candidate - reference) / abs(reference) if reference else abs(candidate)
