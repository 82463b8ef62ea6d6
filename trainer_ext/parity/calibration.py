"""How far apart the same training comes to lie by rounding alone: the reference, run again in ways that must not matter.

Threads, the optimizer's kernel, the order of the rows within a micro-batch and the number of micro-batches change the
order of summation and nothing else. What that does to losses, gradient norms and weights is the noise of a machine, a
model and a dtype; a tolerance is a stated multiple of it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trainer_ext.optim.rules import is_number
from trainer_ext.parity.comparison import compare, weight_share
from trainer_ext.parity.tolerance import Tolerance

if TYPE_CHECKING:
    from trainer_ext.parity.matrix import Matrix
    from trainer_ext.parity.trajectory import Trajectory

MULTIPLE = 10  # of the largest noise, to allow for what a few reruns do not show


@dataclass(frozen=True)
class Noise:
    """What one way of running the reference again changed, at the most.

    Attributes:
        way: What was changed.
        loss: Of a step's loss, relative.
        grad_norm: Of a step's gradient norm, relative.
        metric: Of an evaluation's loss, relative.
        weights: Of an element of the final weights, as a share of the way that it can have gone.
    """

    way: str
    loss: float
    grad_norm: float
    metric: float
    weights: float


def ways(matrix: "Matrix") -> dict[str, Callable[[], "Trajectory"]]:
    """The reference's reruns, by what is changed in each."""
    from trainer_ext.parity.modes import Mode

    task, batch, cores = matrix.task, matrix.args.per_device_train_batch_size, torch.get_num_threads()
    single = Mode("calibrate")

    def threads(count: int) -> "Trajectory":
        kept = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return matrix.reference_run(single, task, dropout=False)
        finally:
            torch.set_num_threads(kept)

    def rows_reversed() -> "Trajectory":
        collate = task.collator
        turned = replace(task, collator=lambda rows: collate(rows[::-1]))
        return matrix.reference_run(single, turned, dropout=False)

    def split(parts: int) -> "Trajectory":
        return matrix.reference_run(Mode(f"calibrate_ga{parts}", parts), task, dropout=False)

    other_threads = 1 if cores > 1 else 2
    other_kernel = "adamw_torch" if "fused" in str(matrix.args.optim) else "adamw_torch_fused"
    found: dict[str, Callable[[], Trajectory]] = {
        f"{other_threads} thread(s) instead of {cores}": lambda: threads(other_threads),
        f"{other_kernel} for the optimizer": lambda: matrix.reference_run(
            single, task, dropout=False, optim=other_kernel
        ),
        "rows of each batch reversed": rows_reversed,
    }
    for parts in (2, 4):
        if batch % parts == 0:
            found[f"{parts} micro-batches"] = partial(split, parts)
    return found


def calibrate(matrix: "Matrix") -> Iterator[Noise]:
    """Run the reference, then once in each of the ways; the noise of each."""
    from trainer_ext.parity.modes import Mode

    reference = matrix.reference_run(Mode("calibrate"), matrix.task, dropout=False)
    for way, run in ways(matrix).items():
        other = run()
        found = compare(reference, other)
        yield Noise(
            way,
            found.max_relative_loss_difference,
            found.max_relative_gradient_difference,
            found.max_relative_metric_difference,
            weight_share(reference, other),
        )


def tolerance(noise: list[Noise]) -> Tolerance:
    """The tolerance that the noise asks for: `MULTIPLE` times the largest of each.

    Raises:
        ValueError: Nothing was measured, or a rerun came to a number that is not finite.
    """
    if not noise:
        raise ValueError("there is no noise to take a tolerance from.")
    for one in noise:
        if not math.isfinite(one.loss + one.grad_norm + one.metric + one.weights):
            raise ValueError(f"the reference, run again with {one.way}, came to a number that is not finite: {one}.")
    relative = max(max(one.loss, one.grad_norm, one.metric) for one in noise)
    return Tolerance(f"{MULTIPLE} x noise", MULTIPLE * relative, MULTIPLE * max(one.weights for one in noise))


def as_json(noise: list[Noise]) -> dict[str, Any]:
    """What `calibration.json` holds."""
    held = tolerance(noise)
    return {
        "multiple": MULTIPLE,
        "noise": [asdict(one) for one in noise],
        "tolerance": {"relative": held.relative, "weights": held.weights},
    }


def from_json(document: dict[str, Any]) -> Tolerance:
    """The tolerance in a `calibration.json`.

    Raises:
        ValueError: It is none.
    """
    try:
        held, multiple = document["tolerance"], document["multiple"]
        relative, weights = held["relative"], held["weights"]
    except (KeyError, TypeError):
        relative = weights = multiple = None
    if not all(is_number(number) and number >= 0 for number in (relative, weights, multiple)):
        raise ValueError("it is not what `trainer-ext parity calibrate` writes.")
    return Tolerance(f"{multiple} x noise", float(relative), float(weights))
