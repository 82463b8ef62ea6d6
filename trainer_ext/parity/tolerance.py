"""How far two numbers may lie apart: the tolerances that comparisons hold runs to."""

import math
from dataclasses import dataclass

from trainer_ext.parity.trajectory import Trajectory


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


BITWISE = Tolerance()
# Where only the order of summation differs. AdamW can move a weight whose gradient is mathematically 0 by a share of
# the learning rate on the sign of a rounding error; hence the wide share for weights.
ROUNDING = {
    "float64": Tolerance("float64", relative=1e-12, weights=1e-6),
    "float32": Tolerance("fp32", relative=1e-4, weights=0.1),
    "bfloat16": Tolerance("bf16", relative=0.05, weights=1.0),
}


def rounding_of(a: Trajectory, b: Trajectory, relative: float | None = None) -> Tolerance:
    """The tolerance of the coarser dtype among the two runs' weights; with another relative part where one is given."""
    if relative == 0.0:
        return BITWISE
    held = {dtype for run in (a, b) for dtype, _ in run.parameters.values()}
    found = ROUNDING["bfloat16" if held & {"bfloat16", "float16"} else "float64" if held == {"float64"} else "float32"]
    return found if relative is None else Tolerance(f"{relative:g}", relative, found.weights)
