"""What weights, random numbers, denominators, losses and gradients show."""

import math
from itertools import pairwise

from trainer_ext.parity.differences import shortened
from trainer_ext.parity.evidence import Evidence, near


def coarser_dtype(e: Evidence) -> str | None:
    dtypes = [{dtype for dtype, _ in run.parameters.values()} for run in (e.a, e.b)]
    low = dtypes[1] & {"bfloat16", "float16"}
    if low and not dtypes[0] & low:
        return f"The candidate's weights are {', '.join(sorted(low))}, the reference's {', '.join(sorted(dtypes[0]))}"
    return None


def few_weights_differ(e: Evidence) -> str | None:
    names = _other_weights(e)
    if len(names) <= len(e.a.initial_weights) // 4:
        return f"{len(names)} of {len(e.a.initial_weights)} differ: {shortened(', '.join(names), 120)}"
    return None


def weights_differ(e: Evidence) -> str | None:
    return f"{len(_other_weights(e))} of {len(e.a.initial_weights)} tensors differ before the first step"


def draws_nothing(e: Evidence) -> str | None:
    idle = [any(x.rng == y.rng is not None for x, y in pairwise(run.steps)) for run in (e.a, e.b)]
    if idle[0] != idle[1]:
        return f"The {'candidate' if idle[1] else 'reference'} draws no random number between two steps"
    return None


def same_but_rng(e: Evidence) -> str | None:
    return f"Rows and weights are equal, the generator's state from step {e.at} on is not"


def not_finite(e: Evidence) -> str | None:
    value = e.difference.candidate
    return f"Step {e.at} came to {value}" if isinstance(value, float) and not math.isfinite(value) else None


def counts_items(e: Evidence) -> str | None:
    value, items = e.step_b.denominator, sum(e.step_b.sizes)
    if value == items != e.step_a.denominator:
        return f"The candidate divides by {items}, the number of rows, instead of {e.step_a.denominator:g}"
    return None


def part_of_the_step(e: Evidence) -> str | None:
    found = _whole(1 / e.ratio("denominator"), e.parts)
    return f"Its ratio to the reference's is 1 / {e.parts[found]}: 1 / {found}" if found else None


def denominator_ratio(e: Evidence) -> str | None:
    return f"Its ratio to the reference's is {e.ratio('denominator'):.6g}"


def scaled_by_parts(e: Evidence) -> str | None:
    name = "grad_norm" if e.difference.quantity == "grad_norm" else "loss"
    both = {n: e.ratio(n) for n in (name, "grad_norm")}
    if (found := _whole(both[name], e.parts)) is None:
        return None
    seen = (
        "loss and gradient are" if near(both["grad_norm"], both[name]) and name == "loss" else f"the {_words(name)} is"
    )
    return f"In step {e.at} {seen} {both[name]:.3f} times the reference's = {found}"


def mean_of_means(e: Evidence) -> str | None:
    if not e.parts or e.step_b.denominator is not None or e.at != e.a.steps[0].step:
        return None
    ratio = e.ratio("loss")
    times = min([1, *e.parts.values()], key=lambda count: abs(math.log(ratio / count)) if ratio > 0 else math.inf)
    if not abs(ratio / times - 1) <= 0.5:
        return None
    scaled = "" if times == 1 else f", about {times} times, which is not divided out either"
    return (
        f"The loss of step {e.at} is {ratio:.4f} times the reference's{scaled}; each micro-batch has a mean of its own"
    )


def update_differs(e: Evidence) -> str | None:
    if e.at > e.a.steps[0].step:
        return f"Loss, gradient and rate of step {e.at - 1} are equal; the loss after its update is not"
    return None


def first_loss_differs(e: Evidence) -> str | None:
    return f"Rows and weights are equal; the loss is {e.ratio('loss'):.6g} times the reference's"


def clipped_early(e: Evidence) -> str | None:
    limit = (e.b.header.get("arguments") or e.a.header.get("arguments") or {}).get("max_grad_norm") or 0.0
    ours, theirs = e.step_a.grad_norm or 0.0, e.step_b.grad_norm or 0.0
    highest = max(step.grad_norm or 0.0 for step in e.b.steps)
    micro = len(e.step_b.sizes) // e.b.world_size
    if micro > 1 and 0 < limit < ours and theirs < ours and highest <= limit * micro:
        return (
            f"The loss of step {e.at} is equal; its gradient's norm before clipping is {theirs:.4g} instead of {ours:.4g}, "
            f"and never above {micro} micro-batches x max_grad_norm {limit:g}"
        )
    return None


def scaled_by_ranks(e: Evidence) -> str | None:
    ratio, ranks = e.ratio("grad_norm"), e.b.world_size
    if ranks == 1:
        return None
    for value, said in ((1 / ranks, f"1 / {ranks} = 1 / world size"), (ranks, f"{ranks} = world size")):
        if near(ratio, value):
            return f"The loss of step {e.at} is equal, its gradient {ratio:.3f} times the reference's: {said}"
    return None


def gradient_kept(e: Evidence) -> str | None:
    first = e.a.steps[0].step
    if e.at == first + 1:
        return f"Step {first} is equal, and so is the loss of step {e.at}; its gradient is not"
    return None


def gradient_ratio(e: Evidence) -> str | None:
    return f"The loss of step {e.at} is equal, its gradient's norm {e.ratio('grad_norm'):.4g} times the reference's"


def clip_differs(e: Evidence) -> str | None:
    ours, theirs = float(e.difference.reference), float(e.difference.candidate)
    norm = e.step_a.grad_norm or math.nan
    return f"Of a gradient of norm {norm:.4g} the optimizer gets {theirs:.4g} instead of {ours:.4g}"


def _other_weights(e: Evidence) -> list[str]:
    a, b = e.a.initial_weights, e.b.initial_weights
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _whole(ratio: float, parts: dict[str, int]) -> str | None:
    """Which of the parts a ratio is."""
    return next((name for name, count in parts.items() if near(ratio, count)), None)


def _words(quantity: str) -> str:
    return {"grad_norm": "gradient", "loss": "loss"}[quantity]
