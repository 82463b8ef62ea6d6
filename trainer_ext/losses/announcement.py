"""What a step's denominators were announced to be, and whether the losses came with those.

A step is divided by the announced total before its losses are known. A loss that then comes with a denominator
that no micro-batch was announced with would be divided by the wrong number, so that is an error.
"""

import torch
from torch import Tensor

TOLERANCE = 1e-6  # relative to the largest announced: a loss may sum its denominator in float32


class Announcement:
    """The denominators of one step's micro-batches on this rank.

    Looking at a number on an accelerator waits for it. A miss is therefore only noted there, and looked at when
    the trainer logs; on a CPU, and where `now` says so, it is looked at once.
    """

    def __init__(self) -> None:
        self._announced: Tensor | None = None
        self._gap: Tensor | None = None  # the largest miss so far

    def make(self, denominators: list[Tensor]) -> Tensor:
        """Announce one denominator a micro-batch; returns their sum, a scalar."""
        self._announced = torch.stack(denominators)
        return self._announced.sum()

    def hold(self, denominator: Tensor, *, now: bool) -> None:
        """Note how far `denominator` lies from the nearest announced.

        Raises:
            RuntimeError: It is none of them.
        """
        if self._announced is None:
            return
        if self._announced.device.type == "cpu" and denominator.item() in self._announced.tolist():
            return
        gap = (self._announced - denominator.to(self._announced)).abs().min()
        self._gap = gap if self._gap is None else torch.maximum(self._gap, gap)
        if now or gap.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at what was noted.

        Raises:
            RuntimeError: A loss came with a denominator that was not announced.
        """
        if self._gap is None or self._announced is None:
            return
        gap = self._gap.item()
        if not gap <= TOLERANCE * max(1.0, self._announced.abs().max().item()):
            raise RuntimeError(
                f"the loss came with a denominator that is {gap:g} off every one announced for this step "
                f"({self._announced.tolist()}). The step is divided by the announced total, so its loss would be wrong: "
                "loss.denominator(labels) must be what loss(logits, labels) returns, for the labels of the batch."
            )
