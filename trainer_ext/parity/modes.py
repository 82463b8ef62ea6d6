"""The ways in which the same training is launched: how a mode splits the batch of one optimizer step."""

import re
from dataclasses import dataclass, replace

from trainer_ext.task import Task


@dataclass(frozen=True)
class Mode:
    """One way to launch.

    Attributes:
        name: As in `--modes`.
        accumulation: Micro-batches of one optimizer step: a global batch is split into so many.
        ragged: Whether the training rows are cut so that each epoch ends in a short window.
    """

    name: str
    accumulation: int = 1
    ragged: bool = False

    def micro_batch(self, batch: int) -> int:
        """Rows of a micro-batch where a step takes `batch` rows.

        Raises:
            ValueError: `batch` cannot be split.
        """
        if batch % self.accumulation:
            raise ValueError(
                f"mode {self.name!r} splits the batch of a step into {self.accumulation} micro-batches, and batch size "
                f"{batch} cannot be: give a multiple of {self.accumulation}."
            )
        return batch // self.accumulation

    def rows(self, task: Task, batch: int, max_steps: int) -> Task:
        """The task as this mode trains it: where it is ragged, with rows for whole windows and a short one."""
        if not self.ragged:
            return task
        micro = self.micro_batch(batch)
        tail = max(1, micro // 2) + (micro if self.accumulation > 2 else 0)
        windows = (len(task.train) - tail) // batch
        if max_steps > 0:
            windows = min(windows, max_steps - 1)
        if windows < 0:
            raise ValueError(f"mode {self.name!r} needs {tail} training rows or more; there are {len(task.train)}.")
        return replace(task, train=task.train.select(range(windows * batch + tail)))


def find_mode(name: str, accumulation: int = 1) -> Mode:
    """The mode called `name`.

    Args:
        name: `single`, `gaN` or `ragged`.
        accumulation: Micro-batches of a step where the name does not say; a ragged window has at least two.

    Raises:
        ValueError: There is none; the message lists the choices.
    """
    if name == "single":
        return Mode(name, accumulation)
    if name == "ragged":
        return Mode(name, accumulation if accumulation > 1 else 4, ragged=True)
    if (match := re.fullmatch(r"ga([1-9]\d*)", name)) is not None:
        return Mode(name, accumulation=int(match[1]))
    raise ValueError(f"mode {name!r} is not known. Choices: single, gaN (accumulation N, such as ga4), ragged.")
