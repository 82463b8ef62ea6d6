"""The schedules that follow a metric, `reduce_lr_on_plateau` and `greedy`, with one multiplier for every group.

The stock ones move each group's rate by itself, between bounds and by steps that are the same for all, so that groups
of different rates lose their ratios: at the floor all are equal, and a step smaller than `eps` is not taken by the
group with the lower rate. Here the stock schedule moves one rate, the optimizer's own, and every group gets its share.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from trainer_ext.engine import base_optimizer

if TYPE_CHECKING:  # the mixin calls the schedule's methods through super(), and is none itself
    _ScheduleBase = ReduceLROnPlateau
else:
    _ScheduleBase = object


def own_rate(optimizer: Optimizer) -> float:
    """The rate that the optimizer was made with; the highest of its groups where it was made without."""
    rate = base_optimizer(optimizer).defaults.get("lr")
    return float(max(group["lr"] for group in optimizer.param_groups) if rate is None else rate)


class _OneMultiplier(_ScheduleBase):
    """Put before a schedule among the bases, it gives the schedule one rate to move and every group its share of it."""

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self.driven = optimizer  # itself: its list of groups is another one after a resume
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.own_rate = own_rate(optimizer)
        super().__init__(SGD([torch.zeros(())], lr=self.own_rate), **options)
        self._share()

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as the stock ones do
        """Take the next value of the metric."""
        super().step(metrics, epoch)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        state = {name: value for name, value in super().state_dict().items() if name not in ("driven", "own_rate")}
        return {**state, "rate": self.optimizer.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "rate"})
        self.optimizer.param_groups[0]["lr"] = state_dict["rate"]
        self._share()

    def _share(self) -> None:
        multiplier = self.optimizer.param_groups[0]["lr"] / self.own_rate if self.own_rate else 1.0
        for group in self.driven.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self._last_lr = [group["lr"] for group in self.driven.param_groups]


class ProportionalPlateau(_OneMultiplier, ReduceLROnPlateau):
    """`ReduceLROnPlateau`: the multiplier is lowered by `factor` when the metric has not improved for `patience`
    evaluations. `min_lr` and `eps` are rates of the optimizer's own."""


class ProportionalGreedy(_OneMultiplier, GreedyLR):  # type: ignore[misc]  # the bases annotate get_last_lr differently
    """`GreedyLR` (https://arxiv.org/abs/2512.14527): lowered by `factor` on a plateau, raised by it on improvement.

    Raises:
        ValueError: The optimizer's own rate is not between `min_lr` and `max_lr`, whose defaults are 0.001 and 1:
            a lower one would never be lowered.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        super().__init__(optimizer, **options)
        low, high = self.min_lrs[0], self.max_lrs[0]
        if not low <= self.own_rate <= high:
            raise ValueError(
                f"lr_scheduler_type='greedy' moves the rate between min_lr={low} and max_lr={high}, and the learning rate "
                f"is {self.own_rate}. Give both in lr_scheduler_kwargs."
            )


PLATEAUS = {"reduce_lr_on_plateau": ProportionalPlateau, "greedy": ProportionalGreedy}
STOCK = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}  # whose options they take
