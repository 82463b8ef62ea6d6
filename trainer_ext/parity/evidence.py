"""What a diagnosis looks at: two records, their first difference, and the arguments in which they differ."""

import math
from dataclasses import dataclass

from trainer_ext.parity.differences import Difference, shortened
from trainer_ext.parity.trajectory import Step, Trajectory

CLOSE = 2e-3  # how near a ratio has to lie to the number that it is taken for
# Of a run's arguments: where it wrote, and what changes none of its numbers.
NOT_ARITHMETIC = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "logging_strategy",
                  "logging_steps", "save_strategy", "save_steps", "dataloader_pin_memory", "local_rank", "deepspeed",
                  "save_total_limit", "use_cpu", "hub_token", "push_to_hub_token", "logging_first_step")  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Two runs and their first difference; `a` is the reference, `b` the candidate."""

    a: Trajectory
    b: Trajectory
    difference: Difference

    @property
    def at(self) -> int:
        return self.difference.step

    @property
    def step_a(self) -> Step:
        return self.a.steps[max(self.at, 1) - self.a.steps[0].step]

    @property
    def step_b(self) -> Step:
        return self.b.steps[max(self.at, 1) - self.b.steps[0].step]

    @property
    def parts(self) -> dict[str, int]:
        """What a step of the candidate is split into, and into how many; those that say the most come first."""
        ranks = self.b.world_size
        accumulation = max(len(step.sizes) for step in self.b.steps) // ranks
        names = {
            "accumulation steps x ranks": accumulation * ranks,
            "accumulation steps": accumulation,
            "ranks": ranks,
        }
        found: dict[str, int] = {}
        for name, count in names.items():
            if count > 1 and not (name == "accumulation steps x ranks" and 1 in (accumulation, ranks)):
                found[name] = count
        return found

    def ratio(self, name: str) -> float:
        """Candidate over reference of a number of the step in question; NaN without both."""
        ours, theirs = getattr(self.step_a, name), getattr(self.step_b, name)
        return theirs / ours if ours and theirs is not None else math.nan


def arguments(e: Evidence) -> tuple[str, ...]:
    """The training arguments in which the two records differ."""
    ours, theirs = (run.header.get("arguments") or {} for run in (e.a, e.b))
    names = sorted((ours.keys() & theirs.keys()) - set(NOT_ARITHMETIC))
    return tuple(
        f"{n}: {shortened(str(ours[n]))} / {shortened(str(theirs[n]))}" for n in names if ours[n] != theirs[n]
    )


def near(value: float, wanted: float, share: float = CLOSE) -> bool:
    """Whether a ratio is the number that it is taken for."""
    return abs(value - wanted) <= share * abs(wanted)
