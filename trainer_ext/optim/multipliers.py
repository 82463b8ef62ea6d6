"""The courses of the learning rate that are known beforehand: pure functions from the step to a multiplier.

`MULTIPLIERS[name](step, run, **options)` is what every group's own rate is multiplied by in optimizer step `step`
(from 0), so that the ratios between groups hold at every step. Names and options are those of transformers, and so are
the numbers, bit for bit, up to the run's last step; `one_cycle` is `torch.optim.lr_scheduler.OneCycleLR` without the
momentum. Past its end a run keeps its last multiplier.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

SHAPES = ("linear", "cosine", "1-sqrt")
CHOICES = {"anneal_strategy": ("cos", "linear"), "warmup_type": SHAPES, "decay_type": SHAPES}


class Run(NamedTuple):
    """What a course is laid over.

    Attributes:
        warmup_steps: Optimizer steps over which the rate climbs.
        total_steps: Optimizer steps of the whole run, warmup included.
        learning_rate: The optimizer's own rate, which options that name a rate (`min_lr`, `lr_end`) are a share of.
    """

    warmup_steps: int
    total_steps: int
    learning_rate: float = 1.0

    @property
    def steps_after_warmup(self) -> int:
        return max(1, self.total_steps - self.warmup_steps)

    def progress(self, step: int) -> float:
        """The share of the way from the end of the warmup to the end of the run, 1 at most."""
        return min(1.0, (step - self.warmup_steps) / self.steps_after_warmup)


def _warmed_up(course: Callable[..., float]) -> Callable[..., float]:
    """`course` behind a linear climb from 0: `step / warmup_steps`."""

    @wraps(course)
    def with_warmup(step: int, run: Run, **options: Any) -> float:
        if step < run.warmup_steps:
            return step / run.warmup_steps
        return course(step, run, **options)

    return with_warmup


def constant(step: int, run: Run) -> float:
    """1, without a warmup."""
    return 1.0


@_warmed_up
def constant_with_warmup(step: int, run: Run) -> float:
    """1 after the warmup."""
    return 1.0


@_warmed_up
def linear(step: int, run: Run) -> float:
    """Straight down to 0 at the end of the run."""
    return max(0.0, (run.total_steps - step) / run.steps_after_warmup)


@_warmed_up
def polynomial(step: int, run: Run, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    """`(1 - progress)^power` of the way down to the rate `lr_end`."""
    if not run.learning_rate > lr_end:
        raise ValueError(f"lr_end={lr_end} must be below the learning rate, {run.learning_rate}")
    left = 1 - run.progress(step)
    return ((run.learning_rate - lr_end) * left**power + lr_end) / run.learning_rate


@_warmed_up
def inverse_sqrt(step: int, run: Run, *, timescale: int | None = None) -> float:
    """`1 / sqrt(1 + (step - warmup) / timescale)`; the timescale is the warmup, or 10,000 steps (Zhai et al. 2022,
    https://arxiv.org/abs/2106.04560)."""
    timescale = timescale or run.warmup_steps or 10_000
    return 1.0 / math.sqrt((step + (timescale - run.warmup_steps)) / timescale)


@_warmed_up
def cosine(step: int, run: Run, *, num_cycles: float = 0.5) -> float:
    """`(1 + cos(2 pi num_cycles progress)) / 2` (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)."""
    return max(0.0, _wave(run.progress(step), num_cycles))


@_warmed_up
def cosine_with_restarts(step: int, run: Run, *, num_cycles: int = 1) -> float:
    """`num_cycles` times from 1 to 0 along half a cosine, of the same paper."""
    progress = run.progress(step)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


@_warmed_up
def cosine_with_min_lr(
    step: int, run: Run, *, num_cycles: float = 0.5, min_lr: float | None = None, min_lr_rate: float | None = None
) -> float:
    """The cosine down to a floor: the rate `min_lr`, or the share `min_lr_rate`."""
    return _above(_floor(run, min_lr, min_lr_rate), _wave(run.progress(step), num_cycles))


def cosine_warmup_with_min_lr(
    step: int,
    run: Run,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """The same a step ahead, so that the floor is the last step's; the climb begins at `warmup_lr_rate`, or one step up."""
    floor = _floor(run, min_lr, min_lr_rate)
    if step < run.warmup_steps:
        if warmup_lr_rate is None:
            return (step + 1) / run.warmup_steps
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, run.warmup_steps - 1)
    return _above(floor, _wave(run.progress(step + 1), num_cycles))


def warmup_stable_decay(
    step: int,
    run: Run,
    *,
    num_decay_steps: float = 0.1,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """A climb from `min_lr_ratio`, 1, and down to it again in the last `num_decay_steps` (a share of the run below 1).

    The phase of 1 takes what the others leave, or `num_stable_steps`. A tenth of the run for the decay is what Hu et
    al. 2024 (https://arxiv.org/abs/2404.06395) found enough; `1-sqrt` is the decay of Hägele et al. 2024
    (https://arxiv.org/abs/2405.18392).
    """
    if step < run.warmup_steps:
        progress = step / run.warmup_steps
        climbs = {"linear": progress, "cosine": 0.5 * (1.0 - math.cos(math.pi * progress))}
        return _above(min_lr_ratio, climbs.get(warmup_type, 1.0 - math.sqrt(1.0 - progress)))
    decay = decay_steps(run, num_decay_steps)
    stable = run.total_steps - run.warmup_steps - decay if num_stable_steps is None else num_stable_steps
    decayed = step - run.warmup_steps - stable
    if decayed < 0:
        return 1.0
    if decayed >= decay:
        return min_lr_ratio
    progress = decayed / decay
    descents = {"linear": 1.0 - progress, "cosine": _wave(progress, num_cycles), "1-sqrt": 1.0 - math.sqrt(progress)}
    return _above(min_lr_ratio, descents[decay_type])


def decay_steps(run: Run, num_decay_steps: float) -> int:
    """Steps of the decay: a share of the run below 1, rounded up; never more than the warmup leaves."""
    steps = math.ceil(run.total_steps * num_decay_steps) if num_decay_steps < 1 else int(num_decay_steps)
    return max(0, min(steps, run.total_steps - run.warmup_steps))


def one_cycle(
    step: int,
    run: Run,
    *,
    pct_start: float | None = None,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> float:
    """From `1 / div_factor` up to 1, and down to `1 / (div_factor final_div_factor)` at the last step (Smith and Topin
    2018, https://arxiv.org/abs/1708.07120).

    The climb takes `pct_start` of the run (0.3), or the run's warmup; with `three_phase` the way down passes the first
    multiplier again after as many steps as the climb took. The momentum is left as it is.
    """
    if pct_start is not None and run.warmup_steps:
        raise ValueError(
            f"pct_start={pct_start} and warmup_steps={run.warmup_steps} both say how long the climb takes"
        )
    low, last = 1 / div_factor, run.total_steps - 1
    lowest = low / final_div_factor
    peak = run.warmup_steps or (0.3 if pct_start is None else pct_start) * run.total_steps - 1
    ends = [(peak, low, 1.0), (last, 1.0, lowest)]
    if three_phase:
        ends[1:] = [(2 * peak, 1.0, low), (last, low, lowest)]
    begin = 0.0
    for end, start, stop in ends:
        if step <= end:
            way = (step - begin) / (end - begin) if end > begin else 1.0
            if anneal_strategy == "linear":
                return (stop - start) * way + start
            return stop + (start - stop) / 2.0 * (math.cos(math.pi * way) + 1)
        begin = end
    return lowest


MULTIPLIERS: dict[str, Callable[..., float]] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "inverse_sqrt": inverse_sqrt,
    "cosine_with_min_lr": cosine_with_min_lr,
    "cosine_warmup_with_min_lr": cosine_warmup_with_min_lr,
    "warmup_stable_decay": warmup_stable_decay,
    "one_cycle": one_cycle,
}


def multiplier(name: str, run: Run, options: dict[str, Any]) -> Callable[[int], float]:
    """`step -> multiplier` of the course `name`, after a look at a few of its steps.

    Raises:
        ValueError: The options make no course over this run: a multiplier is negative or no number.
    """
    course = partial(MULTIPLIERS[name], run=run, **options)
    for step in {0, run.warmup_steps, run.total_steps // 2, max(0, run.total_steps - 1), run.total_steps}:
        try:
            value = course(step)
            right = math.isfinite(value) and value >= 0
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"lr_scheduler_type={name!r} with {options}: {error}.") from error
        if not right:
            raise ValueError(f"lr_scheduler_type={name!r} with {options}: the multiplier of step {step} is {value}.")
    return course


def options_of(course: Callable[..., Any]) -> dict[str, Any]:
    """The options that a course takes, with their defaults."""
    return {p.name: p.default for p in inspect.signature(course).parameters.values() if p.name not in ("step", "run")}


def _wave(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _above(floor: float, factor: float) -> float:
    return max(0.0, factor * (1.0 - floor) + floor)


def _floor(run: Run, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("give one of min_lr (a rate) and min_lr_rate (a share of the learning rate)")
    return min_lr / run.learning_rate if min_lr is not None else min_lr_rate  # type: ignore[return-value]
