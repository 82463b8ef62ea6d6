"""The differences between two trajectories, in the order in which quantities act: what was trained on, then what came out.

A number that is not finite never equals anything, so that a run of NaN cannot pass.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer_ext.parity.tolerance import Tolerance
from trainer_ext.parity.trajectory import Evaluation, Step, Trajectory

IDLE = 1e-6  # of the largest gradient: some ten roundings of float32
CLIPPED = 1e-6  # the norms of groups are added up in another order than clipping adds them


@dataclass(frozen=True)
class Difference:
    """The first difference: where, in what, and both values."""

    step: int
    quantity: str
    reference: Any
    candidate: Any


def where(difference: Difference) -> str:
    """The step, the quantity and both values, in one sentence without its full stop."""
    at = f"step {difference.step}, {difference.quantity}" if difference.step else difference.quantity
    values = (difference.reference, difference.candidate)
    reference, candidate = (f"{v:.9g}" if isinstance(v, float) else shortened(str(v)) for v in values)
    return f"First difference at {at}: reference {reference}, candidate {candidate}"


def shortened(text: str, length: int = 40) -> str:
    """The text's beginning, where it is long."""
    return text if len(text) <= length else f"{text[:length]}…"


def differences(a: Trajectory, b: Trajectory, tolerance: Tolerance, same_split: bool) -> Iterator[Difference]:
    """Every difference of `b` from `a`; the arguments of `compare`."""
    pairs = common_steps(a, b)
    if not pairs:
        yield Difference(0, "steps", len(a.steps), len(b.steps))
        return
    same_groups, made = a.groups == b.groups, evaluations(a, b)
    same_split_seen = pairs[0][0].sizes == pairs[0][1].sizes and a.world_size == b.world_size
    for place, (ours, theirs) in enumerate(pairs):
        yield from _fed_differences(ours, theirs, same_split)
        if place == 0 and a.steps[0].step == b.steps[0].step:
            yield from _mapping_differences(0, "initial_weights", a.initial_weights, b.initial_weights)
        if same_split_seen and not tolerance.holds(ours.loss, theirs.loss) and math.isfinite(theirs.loss):
            yield from _rng_differences(pairs[place:])  # in itself no difference: nothing may have drawn from it
        yield from _computed_differences(ours, theirs, tolerance, same_groups)
        yield from _rate_differences(a, b, ours, theirs)
        if place == 0:
            yield from _mapping_differences(0, "weight_decay", a.weight_decay, b.weight_decay)
            yield from _optimizer_differences(a.optimizer, b.optimizer, tolerance)
        if tolerance.bitwise and ours.step in a.weights and ours.step in b.weights:
            yield from _mapping_differences(ours.step, "weights", a.weights[ours.step], b.weights[ours.step])
        yield from _evaluation_differences(ours.step, made, tolerance)
    last = a.steps[-1].step
    if last != b.steps[-1].step:
        yield Difference(min(last, b.steps[-1].step) + 1, "steps", last, b.steps[-1].step)
    if len(made[0]) != len(made[1]) and not _unseen(a, b, "evaluations"):
        yield Difference(last, "evaluations", *map(len, made))
    if a.finished and b.finished:
        yield from _unchanged_weights(last, a, b)
        if tolerance.bitwise and not _unseen(a, b, "optimizer_state"):
            yield from _mapping_differences(last, "optimizer_state", a.optimizer_state, b.optimizer_state)
        yield from _final_weight_differences(last, a, b, tolerance)


def common_steps(a: Trajectory, b: Trajectory) -> list[tuple[Step, Step]]:
    """The steps that both records have; one may begin where a run was resumed."""
    theirs = {step.step: step for step in b.steps}
    return [(step, theirs[step.step]) for step in a.steps if step.step in theirs]


def _unseen(a: Trajectory, b: Trajectory, quantity: str) -> bool:
    """Whether one of the paths cannot tell a quantity, and says so."""
    return any(quantity in run.header.get("unseen", ()) for run in (a, b))


def _fed_differences(a: Step, b: Step, same_split: bool) -> Iterator[Difference]:
    """What the step was given."""
    if a.rows != b.rows:
        yield Difference(a.step, "batch", a.rows, b.rows)
    if a.labels != b.labels:
        yield Difference(a.step, "labels", a.labels, b.labels)
    if same_split and a.sizes != b.sizes:
        yield Difference(a.step, "micro_batches", a.sizes, b.sizes)


def _rng_differences(pairs: list[tuple[Step, Step]]) -> Iterator[Difference]:
    """The generators' states after the first of these steps, or where both runs next look: a difference stays."""
    states = ((a.rng, b.rng) for a, b in pairs if a.rng is not None and b.rng is not None)
    ours, theirs = next(states, (None, None))
    if ours != theirs:
        yield Difference(pairs[0][0].step, "rng", ours, theirs)


def _computed_differences(a: Step, b: Step, tolerance: Tolerance, same_groups: bool) -> Iterator[Difference]:
    """What the step computed, up to the gradient that the optimizer gets."""
    if not _same_denominator(a.denominator, b.denominator):
        yield Difference(a.step, "denominator", a.denominator, b.denominator)
    if not tolerance.holds(a.loss, b.loss):
        yield Difference(a.step, "loss", a.loss, b.loss)
    if a.grad_norm is not None and b.grad_norm is not None and not tolerance.holds(a.grad_norm, b.grad_norm):
        yield Difference(a.step, "grad_norm", a.grad_norm, b.grad_norm)
    if a.group_norms is not None and b.group_norms is not None:
        ours, theirs = math.hypot(*a.group_norms), math.hypot(*b.group_norms)
        allowed = max(tolerance.relative, CLIPPED) * ours
        if not abs(theirs - ours) <= allowed:
            yield Difference(a.step, "clipped_grad_norm", ours, theirs)
        if same_groups:
            for place, (x, y) in enumerate(zip(a.group_norms, b.group_norms, strict=True)):
                if not abs(y - x) <= allowed:
                    yield Difference(a.step, f"grad_norm of group {place}", x, y)


def _same_denominator(a: float | None, b: float | None) -> bool:
    """Sums of the same weights in another order: apart by rounding of float64 at the most, in every mode."""
    return a is None or b is None or abs(b - a) <= 1e-12 * abs(a)


def _rate_differences(a: Trajectory, b: Trajectory, ours: Step, theirs: Step) -> Iterator[Difference]:
    if ours.learning_rates == theirs.learning_rates:
        return
    if (
        a.groups == b.groups
        or len(a.groups) != len(ours.learning_rates)
        or len(b.groups) != len(theirs.learning_rates)
    ):
        yield Difference(ours.step, "learning_rate", ours.learning_rates, theirs.learning_rates)
        return
    by_name = (
        {n: rate for g, rate in zip(r.groups, s.learning_rates, strict=True) for n in g}
        for r, s in ((a, ours), (b, theirs))
    )
    yield from _mapping_differences(ours.step, "learning_rate", *by_name)


def _optimizer_differences(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: Tolerance) -> Iterator[Difference]:
    """Settings; in another class (ZeRO-Offload's CPUAdam for AdamW) those that both have, since it has more or fewer
    besides."""
    if not tolerance.bitwise and a.get("class") != b.get("class"):
        shared = (a.keys() & b.keys()) - {"class"}
        a, b = ({name: settings[name] for name in sorted(shared)} for settings in (a, b))
    yield from _mapping_differences(0, "optimizer", a, b)


def _unchanged_weights(last: int, a: Trajectory, b: Trajectory) -> Iterator[Difference]:
    """A run that left every weight as it was proves nothing, unless its learning rate was 0 throughout."""
    if way(a) > 0:
        unchanged = [t.path for t in (a, b) if t.final_weights == t.initial_weights]
        if unchanged:
            yield Difference(last, f"weights left unchanged by {' and '.join(unchanged)}", "changed", "unchanged")


def way(run: Trajectory) -> float:
    """The sum of all steps' highest learning rates."""
    return sum(max(step.learning_rates, default=0.0) for step in run.steps)


def _mapping_differences(step: int, quantity: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b or a[name] != b[name]:
            yield Difference(step, f"{quantity}[{name}]", a.get(name, "absent"), b.get(name, "absent"))


def _final_weight_differences(last: int, a: Trajectory, b: Trajectory, tolerance: Tolerance) -> Iterator[Difference]:
    for name, tensor in b.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield Difference(last, f"weights[{name}]", "finite", "not finite")
    idle = without_gradient(a)
    share = tolerance.weights
    if share is not None and not (a.tensors and b.tensors):
        return  # their digests alone do not say how far they lie apart
    for difference in _mapping_differences(last, "weights", a.final_weights, b.final_weights):
        name = difference.quantity.removeprefix("weights[").removesuffix("]")
        if share is None or name not in a.tensors or name not in b.tensors:
            yield difference
        else:
            gap = tensor_gap(a.tensors[name], b.tensors[name])
            if not gap <= (2.0 if name in idle else share) * way(a):
                yield Difference(last, f"{difference.quantity}: max |difference|", 0.0, gap)


def without_gradient(reference: Trajectory) -> set[str]:
    """The parameters whose gradient is 0 but for rounding, such as the bias of an attention's keys.

    AdamW divides that rounding by its own size, and moves them by up to the learning rate in either direction: in any
    other order of summation they end anywhere within the way that a weight can go.
    """
    largest = max(reference.gradient_scale.values(), default=0.0)
    return {name for name, scale in reference.gradient_scale.items() if scale <= IDLE * largest}


def _evaluation_differences(
    step: int, made: tuple[list[Evaluation], list[Evaluation]], tolerance: Tolerance
) -> Iterator[Difference]:
    """In the evaluations that the reference made after `step`."""
    for place, (ours, theirs) in enumerate(zip(*made, strict=False), start=1):
        if ours.step == step and theirs.step != step:
            yield Difference(min(step, theirs.step), "evaluations", f"after step {step}", f"after step {theirs.step}")
        elif ours.step == step:
            yield from _metric_differences(place, ours, theirs, tolerance)


def evaluations(a: Trajectory, b: Trajectory) -> tuple[list[Evaluation], list[Evaluation]]:
    """Those of both runs, without what a stop alone brought about.

    A `Trainer` that is stopped within an epoch evaluates as at an epoch's end. Where the run was then resumed from that
    step, and the other run made no evaluation there, it is none that the two have in common; nor is one from before a
    record begins.
    """
    first = max((run.steps[0].step for run in (a, b) if run.steps), default=0)
    steps = [{evaluation.step for evaluation in run.evaluations} for run in (a, b)]
    ours, theirs = (
        [e for e in run.evaluations if e.step >= first and (e.step in others or e.step not in run.resumed_at)]
        for run, others in zip((a, b), reversed(steps), strict=True)
    )
    return ours, theirs


def _metric_differences(place: int, a: Evaluation, b: Evaluation, tolerance: Tolerance) -> Iterator[Difference]:
    for name in [*a.metrics, *(name for name in b.metrics if name not in a.metrics)]:
        ours, theirs = a.metrics.get(name), b.metrics.get(name)
        if ours is None or theirs is None or not tolerance.holds(ours, theirs):
            yield Difference(a.step, f"evaluation {place}: {name}", ours, theirs)


def tensor_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of an element; NaN where the shapes differ or one is NaN."""
    if a.shape != b.shape:
        return math.nan
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
