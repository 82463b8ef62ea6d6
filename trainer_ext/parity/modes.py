"""The ways in which the same training is launched: how a mode splits the batch of one optimizer step."""

import re
from dataclasses import dataclass, replace
from typing import cast

from trainer_ext.configs.catalog import config_path
from trainer_ext.rehearsal.launch import Launch
from trainer_ext.task import Task

# The shipped configs that a mode may be launched with; each is the mode's name. DDP's takes its ranks along: `ddp2`.
DEEPSPEED = (
    *("zero0", "zero1", "zero2", "zero2_offload"),
    *("zero3", "zero3_offload_optimizer", "zero3_offload", "zero3_hpz"),
)
FSDP = ("fsdp2", "fsdp2_no_reshard", "fsdp2_activation_checkpointing", "fsdp2_sharded_checkpoint")
CHOICES = ("single", "gaN", "ragged", "ddpN", *DEEPSPEED, *FSDP)


@dataclass(frozen=True)
class Mode:
    """One way to launch.

    Attributes:
        name: As in `--modes`.
        accumulation: Micro-batches of one optimizer step on each rank: a global batch is split into so many a rank.
        ragged: Whether the training rows are cut so that each epoch ends in a short window.
        ranks: Processes; a mode of several is launched with `config`.
        config: The name of a shipped config, or None for this very process.
    """

    name: str
    accumulation: int = 1
    ragged: bool = False
    ranks: int = 1
    config: str | None = None

    @property
    def deepspeed(self) -> str | None:
        """The DeepSpeed config that the trainer is given."""
        return str(config_path(self.config)) if self.config in DEEPSPEED else None

    def launch(self, module: str, argument: str) -> Launch:
        """The launch of `module` with one argument, by the launcher that people use for this config."""
        if self.deepspeed is not None:
            return Launch("deepspeed.launcher.runner", [], ["-m", module], [argument])
        options = ["--config_file", str(config_path(cast(str, self.config)))]
        return Launch("accelerate.commands.launch", options, ["-m", module], [argument])

    def micro_batch(self, batch: int) -> int:
        """Rows of a micro-batch where a step takes `batch` rows.

        Raises:
            ValueError: `batch` cannot be split.
        """
        parts = self.accumulation * self.ranks
        if batch % parts:
            raise ValueError(
                f"mode {self.name!r} splits the batch of a step into {parts} micro-batches, and batch size {batch} cannot "
                f"be: give a multiple of {parts}."
            )
        return batch // parts

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


def find_mode(name: str, accumulation: int = 1, processes: int = 2) -> Mode:
    """The mode called `name`.

    Args:
        name: `single`, `gaN` or `ragged`; `ddpN` or a config's name, and `_gaN` behind it.
        accumulation: Micro-batches of a step where the name does not say; a ragged window has at least two.
        processes: Ranks of a launched mode where the name does not say.

    Raises:
        ValueError: There is none; the message lists the choices.
    """
    if name == "single":
        return Mode(name, accumulation)
    if name == "ragged":
        return Mode(name, accumulation if accumulation > 1 else 4, ragged=True)
    if (match := re.fullmatch(r"ga([1-9]\d*)", name)) is not None:
        return Mode(name, accumulation=int(match[1]))
    if (match := re.fullmatch(r"(.+?)(?:_ga([1-9]\d*))?", name)) is not None:
        launched, parts = match[1], int(match[2] or accumulation)
        if (ddp := re.fullmatch(r"ddp(\d*)", launched)) is not None and ddp[1] not in ("0", "1"):
            return Mode(name, parts, ranks=int(ddp[1] or processes), config="ddp")
        if launched in (*DEEPSPEED, *FSDP):
            return Mode(name, parts, ranks=processes, config=launched)
    raise ValueError(f"mode {name!r} is not known. Choices: {', '.join(CHOICES)}; _gaN behind one accumulates over N.")
