"""The learning rate's course by name: one multiplier of each group's own rate, advanced once an optimizer step.

Names and options go in, `torch`'s schedule over an optimizer comes out. What is known beforehand is in
`multipliers.py`, what follows a metric in `plateaus.py`.
"""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from trainer_ext.optim.multipliers import CHOICES, MULTIPLIERS, Run, decay_steps, multiplier, options_of
from trainer_ext.optim.plateaus import PLATEAUS, STOCK, own_rate

logger = logging.get_logger(__name__)

NAMES = (*MULTIPLIERS, *PLATEAUS)
WITHOUT_WARMUP = ("constant", *PLATEAUS)


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    options: dict[str, Any] | None = None,
) -> LRScheduler:
    """The schedule `name` over `total_steps` optimizer steps.

    Args:
        name: One of `NAMES`: those of transformers, and `one_cycle`.
        optimizer: What it drives.
        warmup_steps: Optimizer steps over which the rate climbs from 0.
        total_steps: Optimizer steps of the whole run, warmup included.
        options: What this schedule takes besides, such as `{"num_cycles": 2}`. Options that are rates (`min_lr`,
            `lr_end`) go by the optimizer's own rate, that it was made with; groups with another rate get their share.

    Raises:
        ValueError: There is no such schedule, it has no such option, or the option's value makes no schedule.
    """
    name, options = str(getattr(name, "value", name)), options or {}
    if findings := check_schedule(name, options):
        raise ValueError("; ".join(findings))
    if isinstance(optimizer, LayerWiseDummyOptimizer):  # one optimizer a parameter, which transformers drives
        if name not in set(SchedulerType):
            raise ValueError(
                f"lr_scheduler_type={name!r} cannot drive a layer-wise optimizer; choose one of transformers."
            )
        return get_scheduler(name, optimizer, warmup_steps, total_steps, options)
    if warmup_steps and name in WITHOUT_WARMUP:
        logger.warning(f"lr_scheduler_type={name!r} has no warmup: warmup_steps={warmup_steps} does nothing.")
    if name in PLATEAUS:
        return PLATEAUS[name](optimizer, **options)
    run = Run(warmup_steps, total_steps, own_rate(optimizer))
    asked = options.get("num_decay_steps", 0)
    if asked >= 1 and decay_steps(run, asked) < asked:
        logger.warning(
            f"num_decay_steps={asked} is cut to {decay_steps(run, asked)}: the run has {total_steps} steps, of which "
            f"{warmup_steps} are warmup."
        )
    return LambdaLR(optimizer, multiplier(name, run, options))


def check_schedule(name: str, options: dict[str, Any]) -> list[str]:
    """What is wrong with a schedule's name and options, as far as it shows before the run's length is known."""
    if name not in NAMES:
        return [f"lr_scheduler_type={name!r} must be one of {', '.join(NAMES)}"]
    taken = options_of(MULTIPLIERS[name]) if name in MULTIPLIERS else options_of(STOCK[name])
    if name in PLATEAUS:
        del taken["optimizer"]
    findings = []
    for option, value in options.items():
        where = f"lr_scheduler_kwargs: {option}={value!r}"
        if option not in taken:
            findings.append(f"{where}: {name} takes {', '.join(taken) or 'no options'}")
        elif option in CHOICES:
            if value not in CHOICES[option]:
                findings.append(f"{where} must be one of {', '.join(CHOICES[option])}")
        elif isinstance(taken[option], bool | str):
            if type(value) is not type(taken[option]):
                findings.append(f"{where} must be a {type(taken[option]).__name__}")
        elif isinstance(value, bool) or not isinstance(value, int | float | type(taken[option])):
            findings.append(f"{where} must be a number")
    return findings


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """The current rate of every group by the group's name or number; nothing where all share one rate."""
    groups = optimizer.param_groups
    if len({(float(group.get("initial_lr", group["lr"])), float(group["lr"])) for group in groups}) == 1:
        return {}
    return {str(group.get("name", i)): float(group["lr"]) for i, group in enumerate(groups)}
