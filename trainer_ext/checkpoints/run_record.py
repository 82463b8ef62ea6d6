"""What saved a checkpoint: the engine, the order of the data and the optimizer's groups, as `saved_on.json` in it.

Written with every checkpoint, and held against the run that goes on from it.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers.trainer_utils import has_length

from trainer_ext.checkpoints.durable import write_durably
from trainer_ext.engine import base_optimizer, parameter_groups, plain_name, saves_shards

if TYPE_CHECKING:
    from transformers import Trainer

FILE = "saved_on.json"
UNNAMED = "a flat part of several"  # in the place of a name, where an engine hides what its optimizer holds
KEPT = (bool, int, float, str, tuple, Tensor, type(None))  # what an optimizer's options are made of
PLAIN = ("one process", "DDP")  # their files are the same


@dataclass(frozen=True)
class RunRecord:
    """What saved a checkpoint, or goes on from it.

    Attributes:
        layout: The engine, and how it writes its state, such as `ZeRO-2` or `FSDP2, sharded`.
        world_size: Processes.
        shared: Ranks that see the same samples (tensor, context and sequence parallelism).
        data: What the order of the samples and their place in the run depend on.
        optimizer: The class that takes the step.
        schedule: The class of the schedule.
        groups: The optimizer's, each with its options and, as `params`, the names of its parameters.
    """

    layout: str
    world_size: int
    shared: int
    data: dict[str, Any]
    optimizer: str = ""
    schedule: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def names(self) -> list[list[str]]:
        """The parameters of each group."""
        return [group["params"] for group in self.groups]

    def same_files(self, other: "RunRecord") -> bool:
        """Whether a run like this one reads what the other saved by itself."""
        if self.layout in PLAIN:
            return other.layout in PLAIN
        same_ranks = self.world_size == other.world_size or not self.layout.startswith("ZeRO")
        return self.layout == other.layout and same_ranks

    def __str__(self) -> str:
        return f"{self.layout} on {self.world_size} process(es)"


def save_record(trainer: "Trainer", folder: Path) -> None:
    """Write what runs into a checkpoint's folder."""
    record = record_of(trainer, trainer.callback_handler.train_dataloader)
    write_durably(folder / FILE, json.dumps(asdict(record), default=float) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """What saved a checkpoint; None where that was another program."""
    path = folder / FILE
    return RunRecord(**json.loads(path.read_text())) if path.is_file() else None


def record_of(trainer: "Trainer", loader: Any) -> RunRecord:
    """What runs; before the optimizer is there, without it and its groups.

    Args:
        trainer: Whose run it is.
        loader: Of its training data.
    """
    shared = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    made = RunRecord(_layout(trainer), trainer.args.world_size, shared, _data(trainer, loader, shared))
    base = base_optimizer(trainer.optimizer)
    if not getattr(base, "param_groups", None) or trainer.lr_scheduler is None:
        return made
    names = {parameter: plain_name(name) for name, parameter in cast(nn.Module, trainer.model).named_parameters()}
    parameters = parameter_groups(trainer)
    groups = [
        {
            **{name: value for name, value in group.items() if isinstance(value, KEPT)},
            "params": [names.get(parameter, UNNAMED) for parameter in own],
        }
        for group, own in zip(base.param_groups, parameters, strict=True)
    ]
    schedule: Any = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    return RunRecord(
        made.layout, made.world_size, shared, made.data, type(base).__name__, type(schedule).__name__, groups
    )


def require_same_data(saved: RunRecord, now: RunRecord, folder: Path) -> None:
    """Raise where the samples that were trained before the checkpoint would not be those that this run leaves out.

    Raises:
        ValueError: With what differs, and how to have it the same.
    """
    gaps = [
        f"{name}: {value}, now {now.data.get(name)}"
        for name, value in saved.data.items()
        if value != now.data.get(name)
    ]
    if gaps:
        raise ValueError(
            f"{folder} was saved with another order of the training data ({'; '.join(gaps)}), so that samples would be "
            f"left out or trained twice. {_mend(saved, now)} --ignore_data_skip goes on without regard to it, at the "
            "beginning of an epoch."
        )


def _layout(trainer: "Trainer") -> str:
    state: Any = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        zero = state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        return f"ZeRO-{zero.get('stage', 0)}"
    if trainer.is_fsdp_enabled:
        return f"FSDP{state.fsdp_plugin.fsdp_version}, {'sharded' if saves_shards(trainer) else 'whole'}"
    return PLAIN[trainer.args.world_size > 1]


def _data(trainer: "Trainer", loader: Any, shared: int) -> dict[str, Any]:
    args: Any = trainer.args
    ranks = args.world_size // shared
    accumulation, rows = args.gradient_accumulation_steps, trainer.get_total_train_batch_size(args)
    sampler = _sampler(loader)
    found = {
        "sampler": type(sampler).__name__,
        "seed": getattr(sampler, "initial_seed", getattr(sampler, "seed", None)),
        "steps an epoch": math.ceil(len(loader) / accumulation) if has_length(loader) else None,
    }
    if hasattr(sampler, "max_tokens"):
        return found | {"micro-batches a step": ranks * accumulation, "tokens a micro-batch": sampler.max_tokens}
    return found | {"samples a step": rows // ranks if args.accelerator_config.split_batches else rows}


def _sampler(loader: Any) -> Any:
    """What gives the order, below what deals it out."""
    found = layer = getattr(loader, "batch_sampler", None)
    while layer is not None:
        found = getattr(layer, "sampler", None) or layer
        layer = getattr(layer, "batch_sampler", None)
    return found


def _mend(saved: RunRecord, now: RunRecord) -> str:
    ranks = now.world_size // now.shared
    for name, settings in (("samples a step", "per_device_train_batch_size x "), ("micro-batches a step", "")):
        wanted = saved.data.get(name)
        if wanted is None or wanted == now.data.get(name):
            continue
        if wanted % ranks:
            return f"{ranks} ranks cannot share {wanted} {name}: take a number of processes that divides it."
        return f"Set {settings}gradient_accumulation_steps to {wanted // ranks} ({wanted} {name} over {ranks} ranks)."
    return "Set them as they were."


def gaps_between(saved: RunRecord, now: RunRecord) -> list[str]:
    """What of two runs' optimizers differs, so that the state of one cannot be that of the other."""
    found = [
        f"{what}: {old}, now {new}"
        for what, old, new in (
            ("optimizer", saved.optimizer, now.optimizer),
            ("schedule", saved.schedule, now.schedule),
            ("parameter groups", len(saved.groups), len(now.groups)),
            ("ranks that share samples", saved.shared, now.shared),
        )
        if old != new
    ]
    for number, (old, new) in enumerate(zip(saved.names, now.names, strict=False)):
        found += [f"group {number}: {name} is in the checkpoint's alone" for name in sorted(set(old) - set(new))]
        found += [f"group {number}: {name} is in this run's alone" for name in sorted(set(new) - set(old))]
    return found


def set_options(groups: list[dict[str, Any]], saved: RunRecord) -> None:
    """Give the groups of a live optimizer the options that those of the checkpoint had."""
    for group, kept in zip(groups, saved.groups, strict=True):
        for name in kept.keys() & group.keys() - {"params"}:
            value = kept[name]
            group[name] = tuple(value) if isinstance(group[name], tuple) else value
