"""Two trajectories, and the first step and quantity in which they differ.

Quantities are walked in the order in which they act: what was trained on, then what came out. A number that is
not finite never equals anything, so that a run of NaN cannot pass.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer_ext.parity.trajectory import Step, Trajectory


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may lie apart: `absolute + relative * |reference|`; both 0 asks for the same bits.

    Attributes:
        relative: Of losses, gradient norms, denominators and metrics.
        weights: Of each element of the final weights, as a share of the way that a weight can have gone: the sum
            of all steps' learning rates, since AdamW moves no element by much more in a step. None for the same bits.
        name: What to call it in a table.
    """

    name: str = "bitwise"
    relative: float = 0.0
    weights: float | None = None

    @property
    def bitwise(self) -> bool:
        return self.relative == 0.0 and self.weights is None

    def holds(self, reference: float, candidate: float) -> bool:
        """Whether the two are finite and close enough."""
        gap = abs(candidate - reference)
        return math.isfinite(reference) and math.isfinite(candidate) and gap <= self.relative * abs(reference)


@dataclass(frozen=True)
class Difference:
    """The first difference: where, in what, and both values."""

    step: int
    quantity: str
    reference: Any
    candidate: Any


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
    """

    first_difference: Difference | None
    max_abs_loss_difference: float
    max_abs_weight_difference: float
    loss_ratio: float
    gradient_ratio: float
    max_relative_loss_difference: float = 0.0
    max_relative_gradient_difference: float = 0.0

    @property
    def equal(self) -> bool:
        return self.first_difference is None


BITWISE = Tolerance()
IDLE = 1e-6  # of the largest gradient: some ten roundings of float32


def compare(
    reference: Trajectory, candidate: Trajectory, tolerance: Tolerance = BITWISE, *, same_split: bool = True
) -> Comparison:
    """Hold `candidate` against `reference`.

    Args:
        reference: What is taken to be right.
        candidate: What is tested.
        tolerance: For numbers that went through arithmetic; what was put in must be equal in any case.
        same_split: Whether a step came in the same micro-batches in both.
    """
    first = next(_differences(reference, candidate, tolerance, same_split), None)
    pairs = list(zip(reference.steps, candidate.steps, strict=False))
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
    )


def _differences(a: Trajectory, b: Trajectory, tolerance: Tolerance, same_split: bool) -> Iterator[Difference]:
    yield from _mapping_differences(0, "initial_weights", a.initial_weights, b.initial_weights)
    yield from _optimizer_differences(a.optimizer, b.optimizer, tolerance)
    yield from _mapping_differences(0, "weight_decay", a.weight_decay, b.weight_decay)
    for ours, theirs in zip(a.steps, b.steps, strict=False):
        yield from _step_differences(ours, theirs, tolerance, same_split)
    if len(a.steps) != len(b.steps):
        yield Difference(min(len(a.steps), len(b.steps)) + 1, "steps", len(a.steps), len(b.steps))
    last = len(a.steps)
    if not last:
        yield Difference(0, "steps", "at least 1", last)
    yield from _unchanged_weights(last, a, b)
    yield from _final_weight_differences(last, a, b, tolerance)
    if tolerance.bitwise:
        yield from _mapping_differences(last, "optimizer_state", a.optimizer_state, b.optimizer_state)
    yield from _evaluation_differences(last, a, b, tolerance)


def _optimizer_differences(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: Tolerance) -> Iterator[Difference]:
    """Of what the groups are set to; an engine's own class of the same optimizer has settings of its own besides."""
    if not tolerance.bitwise and a.get("class") != b.get("class"):
        shared = (a.keys() & b.keys()) - {"class"}
        a, b = ({name: settings[name] for name in sorted(shared)} for settings in (a, b))
    yield from _mapping_differences(0, "optimizer", a, b)


def _unchanged_weights(last: int, a: Trajectory, b: Trajectory) -> Iterator[Difference]:
    """A run that left every weight as it was proves nothing, unless its learning rate was 0 throughout."""
    if _way(a) > 0:
        unchanged = [t.path for t in (a, b) if t.final_weights == t.initial_weights]
        if unchanged:
            yield Difference(last, f"weights left unchanged by {' and '.join(unchanged)}", "changed", "unchanged")


def _way(run: Trajectory) -> float:
    """The sum of all steps' highest learning rates."""
    return sum(max(step.learning_rates, default=0.0) for step in run.steps)


def _step_differences(a: Step, b: Step, tolerance: Tolerance, same_split: bool) -> Iterator[Difference]:
    if a.batch != b.batch:
        yield Difference(a.step, "batch", a.batch, b.batch)
    if same_split and a.micro_batches != b.micro_batches:
        yield Difference(a.step, "micro_batches", a.micro_batches, b.micro_batches)
    if not _same_denominator(a.denominator, b.denominator):
        yield Difference(a.step, "denominator", a.denominator, b.denominator)
    if not tolerance.holds(a.loss, b.loss):
        yield Difference(a.step, "loss", a.loss, b.loss)
    if a.grad_norm is not None and b.grad_norm is not None and not tolerance.holds(a.grad_norm, b.grad_norm):
        yield Difference(a.step, "grad_norm", a.grad_norm, b.grad_norm)
    if a.learning_rates != b.learning_rates:
        yield Difference(a.step, "learning_rate", a.learning_rates, b.learning_rates)


def _same_denominator(a: float | None, b: float | None) -> bool:
    """Sums of the same weights in another order: apart by rounding of float64 at the most, in every mode."""
    return a is None or b is None or abs(b - a) <= 1e-12 * abs(a)


def _mapping_differences(step: int, quantity: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b or a[name] != b[name]:
            yield Difference(step, f"{quantity}[{name}]", a.get(name, "absent"), b.get(name, "absent"))


def _final_weight_differences(last: int, a: Trajectory, b: Trajectory, tolerance: Tolerance) -> Iterator[Difference]:
    for name, tensor in b.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield Difference(last, f"weights[{name}]", "finite", "not finite")
    idle = without_gradient(a)
    for difference in _mapping_differences(last, "weights", a.final_weights, b.final_weights):
        name = difference.quantity.removeprefix("weights[").removesuffix("]")
        if tolerance.weights is None or name not in a.tensors or name not in b.tensors:
            yield difference
        else:
            gap = _tensor_gap(a.tensors[name], b.tensors[name])
            share = 2.0 if name in idle else tolerance.weights
            if not gap <= share * _way(a):
                yield Difference(last, f"{difference.quantity}: max |difference|", 0.0, gap)


def without_gradient(reference: Trajectory) -> set[str]:
    """The parameters whose gradient is 0 but for rounding, such as the bias of an attention's keys.

    AdamW divides that rounding by its own size, and moves them by up to the learning rate in either direction: in any
    other order of summation they end anywhere within the way that a weight can go.
    """
    largest = max(reference.gradient_scale.values(), default=0.0)
    return {name for name, scale in reference.gradient_scale.items() if scale <= IDLE * largest}


def _evaluation_differences(last: int, a: Trajectory, b: Trajectory, tolerance: Tolerance) -> Iterator[Difference]:
    if len(a.evaluations) != len(b.evaluations):
        yield Difference(last, "evaluations", len(a.evaluations), len(b.evaluations))
    for place, (ours, theirs) in enumerate(zip(a.evaluations, b.evaluations, strict=False), start=1):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            a_value, b_value = ours.get(name), theirs.get(name)
            if a_value is None or b_value is None or not tolerance.holds(a_value, b_value):
                yield Difference(last, f"evaluation {place}: {name}", a_value, b_value)


def _weight_difference(a: Trajectory, b: Trajectory) -> float:
    if a.tensors.keys() != b.tensors.keys():
        return math.nan
    return _largest(_tensor_gap(a.tensors[name], b.tensors[name]) for name in a.tensors)


def _tensor_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return math.nan
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _largest(values: Iterator[float]) -> float:
    """The maximum; NaN where any is NaN, which `max` may lose."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def _ratio(candidate: float | None, reference: float | None) -> float:
    return candidate / reference if candidate is not None and reference else math.nan


def _relative(reference: float, candidate: float) -> float:
    return abs(candidate - reference) / abs(reference) if reference else abs(candidate)
