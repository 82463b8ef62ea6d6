"""The learning rate's course: a multiplier of each group's own rate, advanced once an optimizer step."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    options: dict[str, Any] | None = None,
) -> LRScheduler:
    """The schedule that transformers knows as `name`, over `total_steps` optimizer steps.

    Args:
        name: A `SchedulerType`, such as `"linear"`.
        optimizer: What it drives.
        warmup_steps: Optimizer steps over which the rate climbs from 0.
        total_steps: Optimizer steps of the whole run, warmup included.
        options: What this schedule takes besides, such as `{"num_cycles": 2}`.
    """
    return get_scheduler(
        name,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=options,
    )
