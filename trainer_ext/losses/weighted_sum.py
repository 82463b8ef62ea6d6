"""A weighted sum of losses, `sum_k a_k L_k`, as one loss under the contract.

Its parts divide by the same denominator, so their numerators add up:

    numerator    = sum_k a_k numerator_k
    denominator  = the parts' common one
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer_ext.losses.contract import Loss, LossTerms, divide


class WeightedSum:
    """Several losses of the same logits and labels; what each part came to is logged beside the loss.

    Args:
        parts: The losses, by the names under which they are logged.
        weights: The number that multiplies each, by the same names.
        options: Further keyword arguments of each part, by the same names.

    Raises:
        ValueError: There are no parts, a weight is not a finite number, the names differ, or regression is mixed with
            classification.
    """

    def __init__(
        self,
        parts: Mapping[str, Loss],
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.parts, self.weights, self.options = dict(parts), dict(weights), dict(options or {})
        if not self.parts or self.parts.keys() != self.weights.keys() or not self.options.keys() <= self.parts.keys():
            raise ValueError(
                f"a sum of losses {list(self.parts)} with weights {self.weights} and options {self.options}: each part "
                "needs one weight, and options are by the parts' names."
            )
        families = {getattr(part, "is_classification", True) for part in self.parts.values()}
        if len(families) > 1:
            raise ValueError(f"a sum of losses {list(self.parts)}: regression and classification take other labels.")
        if not all(isinstance(w, int | float) and math.isfinite(w) for w in self.weights.values()):
            raise ValueError(f"a sum of losses with weights {self.weights}: a weight is a finite number.")
        self.seen: dict[str, Tensor] = {}  # the numerators of the last call, detached
        self._agreed = False

    @property
    def needs_class_counts(self) -> bool:
        """Whether a part asks how often each class occurs."""
        return any(getattr(part, "needs_class_counts", False) for part in self.parts.values())

    def __call__(self, logits: Tensor, labels: Tensor, *, class_counts: Any = None, **shared: Any) -> LossTerms:
        """The two sums over one micro-batch; arguments as the parts take them.

        Raises:
            ValueError: The parts divide by different denominators.
        """
        found: dict[str, LossTerms] = {}
        for name, part in self.parts.items():
            counted = {"class_counts": class_counts} if getattr(part, "needs_class_counts", False) else {}
            found[name] = part(logits, labels, **counted, **shared, **self.options.get(name, {}))
        denominators = [terms.denominator for terms in found.values()]
        if not self._agreed or labels.device.type == "cpu":  # to look at numbers on an accelerator is to wait for them
            if any(not torch.equal(one, denominators[0]) for one in denominators):
                raise ValueError(
                    f"a sum of losses {list(self.parts)}: their denominators are {[float(d) for d in denominators]}, and "
                    "parts of one sum divide by the same items."
                )
            self._agreed = True
        self.seen = {name: terms.numerator.detach() for name, terms in found.items()}
        numerator = torch.stack([self.weights[name] * terms.numerator for name, terms in found.items()]).sum()
        return LossTerms(numerator, denominators[0])

    def denominator(self, labels: Tensor, **shared: Any) -> Tensor:
        """Scalar: that of every part."""
        return next(iter(self.parts.values())).denominator(labels, **shared)


class PartsSinceTheLog:
    """What each part of a sum of losses came to, added up over the micro-batches since it was last logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, loss: WeightedSum, total: Tensor, *, step: int, counted: bool) -> None:
        """Add the parts of the loss's last call, a micro-batch of the step with that total denominator."""
        self._steps.add(step)
        for name, numerator in loss.seen.items():
            share = divide(numerator, total) if counted else torch.zeros_like(numerator)
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def means(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean over the steps of each part's loss, as `loss_NAME`; it begins anew."""
        means = sum_over_ranks(torch.stack(list(self._sums.values()))) / len(self._steps)
        names = [f"loss_{name}" for name in self._sums]
        self._sums, self._steps = {}, set()
        return dict(zip(names, means.tolist(), strict=True))
