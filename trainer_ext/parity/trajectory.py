"""What a training run recorded: enough to say, step by step, whether another run is the same run.

A recorder is told of the run's beginning, of every optimizer step and of its end; a `Trajectory` is what it
leaves. Floats are stored as they are (JSON keeps every digit of a double), tensors as digests of their bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_ext.engine import full_parameters, plain_name

SCHEMA = 2
# Of a parameter group: recorded elsewhere, or which kernel computes the same thing.
NOT_SETTINGS = ("params", "lr", "initial_lr", "weight_decay", "foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: Counted from 1.
        batch: Fingerprint of the rows of all micro-batches, in order; padding does not show in it.
        micro_batches: How many micro-batches the rows came in.
        denominator: What the step's summed loss was divided by; None where the path does not say.
        loss: The step's loss, as the path itself reports it.
        grad_norm: The gradient's norm before clipping; None where the path does not say, as DeepSpeed without ZeRO.
        learning_rates: The rate of every parameter group, as the step was taken with it.
    """

    step: int
    batch: str
    micro_batches: int
    denominator: float | None
    loss: float
    grad_norm: float | None
    learning_rates: list[float]


@dataclass
class Trajectory:
    """A whole run.

    Attributes:
        path: Who trained: `manual loop`, or the trainer's class name.
        runs_on: `engine` (the class that owned the forward pass), ZeRO `stage`, `world_size`, and `local_fraction`, the
            share of the parameters that a rank holds between two steps, as the run itself saw them.
        initial_weights: Digest of each parameter and buffer before the first step.
        weight_decay: The decay of each parameter's group, by the parameter's name.
        optimizer: The optimizer's class, and what its groups are set to (`betas`, `eps`, ..), by `group.name`.
        steps: Every optimizer step.
        evaluations: Each evaluation's loss and metrics, in order.
        final_weights: As `initial_weights`, after the last step.
        optimizer_state: Digest of each state tensor, as `parameter.key`.
        gradient_scale: The root of the largest second moment of each parameter, where the optimizer keeps them.
    """

    path: str
    runs_on: dict[str, Any] = field(default_factory=dict)
    initial_weights: dict[str, str] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    final_weights: dict[str, str] = field(default_factory=dict)
    optimizer_state: dict[str, str] = field(default_factory=dict)
    gradient_scale: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def save(self, folder: Path) -> None:
        """Write `trajectory.json` and `weights.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {name: value for name, value in vars(self).items() if name not in ("tensors", "steps")}
        record = {"schema": SCHEMA, **record, "steps": [asdict(step) for step in self.steps]}
        (folder / "trajectory.json").write_text(json.dumps(record, indent=1))
        save_file({name: tensor.clone() for name, tensor in self.tensors.items()}, folder / "weights.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            ValueError: The record is of another schema.
        """
        record = json.loads((folder / "trajectory.json").read_text())
        if (schema := record.pop("schema")) != SCHEMA:
            raise ValueError(f"{folder}: its trajectory has schema {schema}; this version reads schema {SCHEMA}.")
        steps = [Step(**step) for step in record.pop("steps")]
        return cls(**record, steps=steps, tensors=load_file(folder / "weights.safetensors"))


class Recorder:
    """Fills a `Trajectory`; the training path calls it, and it touches nothing of the training."""

    def __init__(self, path: str) -> None:
        self.trajectory = Trajectory(path)

    def begin(self, model: nn.Module) -> None:
        """Before the first step; a collective where an engine has split the weights."""
        self.trajectory.initial_weights = digests(dict(full_parameters(model)))

    def step(
        self,
        *,
        window: Iterable[Mapping[str, Tensor]],
        denominator: float | None,
        loss: float,
        grad_norm: float,
        learning_rates: list[float],
    ) -> None:
        """After an optimizer step; the arguments of `manual_loop.train`'s `on_step`."""
        self.step_of_rows(
            [row_digests(batch) for batch in window],
            denominator=denominator,
            loss=loss,
            grad_norm=grad_norm,
            learning_rates=learning_rates,
        )

    def step_of_rows(
        self,
        rows: list[list[str]],
        *,
        denominator: float | None,
        loss: float,
        grad_norm: float | None,
        learning_rates: list[float],
    ) -> None:
        """The same, of the digests of each micro-batch's rows."""
        self.trajectory.steps.append(
            Step(
                step=len(self.trajectory.steps) + 1,
                batch=fingerprint(rows),
                micro_batches=len(rows),
                denominator=denominator,
                loss=loss,
                grad_norm=grad_norm,
                learning_rates=[float(rate) for rate in learning_rates],
            )
        )

    def end(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        evaluations: Iterable[Mapping[str, float]],
        *,
        groups: list[list[nn.Parameter]] | None = None,
        runs_on: dict[str, Any] | None = None,
    ) -> Trajectory:
        """After the last step; a collective, as `begin`.

        Args:
            model: The trained model.
            optimizer: What took the steps, below all wrappers.
            evaluations: Each evaluation's loss and metrics.
            groups: The model's parameters in each of the optimizer's groups, where an engine put others in their place.
            runs_on: What the run stood on; by default this process alone.
        """
        trajectory = self.trajectory
        trajectory.tensors = {
            name: tensor.clone() for name, tensor in full_parameters(model)
        }  # FSDP2 shards again here
        names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        single = {"engine": type(model).__name__, "stage": None, "world_size": 1, "local_fraction": 1.0}
        trajectory.runs_on = runs_on or single
        trajectory.optimizer = {"class": type(optimizer).__name__}
        members = groups or [group["params"] for group in optimizer.param_groups]
        for place, (group, parameters) in enumerate(zip(optimizer.param_groups, members, strict=True)):
            settings = {name: list(v) if isinstance(v, tuple) else v for name, v in group.items()}
            trajectory.optimizer |= {f"{place}.{n}": v for n, v in settings.items() if n not in NOT_SETTINGS}
            for parameter in parameters:
                trajectory.weight_decay[names[parameter]] = float(group.get("weight_decay", 0.0))
        trajectory.evaluations = [dict(evaluation) for evaluation in evaluations]
        trajectory.final_weights = digests(trajectory.tensors)
        if trajectory.runs_on["world_size"] == 1:
            trajectory.gradient_scale = {
                names[parameter]: state["exp_avg_sq"].max().sqrt().item()
                for parameter, state in optimizer.state.items()
                if "exp_avg_sq" in state
            }
            trajectory.optimizer_state = digests(
                {
                    f"{names[parameter]}.{key}": value
                    for parameter, state in optimizer.state.items()
                    for key, value in state.items()
                    if isinstance(value, Tensor)
                }
            )
        return trajectory


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by name, in the order of the names."""
    return {name: digest(tensors[name]) for name in sorted(tensors)}


def fingerprint(rows: Iterable[Iterable[str]]) -> str:
    """One digest for a step, from those of the rows of its micro-batches, in order."""
    return hashlib.sha256("".join(chain.from_iterable(rows)).encode()).hexdigest()[:16]


def row_digests(batch: Mapping[str, Tensor]) -> list[str]:
    """One digest for each row of a micro-batch.

    A row counts with the positions that its attention mask keeps (and every label that is not -100), so that it has
    one digest however long the batch it was padded into; a step has one however it was split over micro-batches and
    ranks.
    """
    columns = {name: batch[name].cpu() for name in sorted(batch) if isinstance(batch[name], Tensor)}
    mask = columns.get("attention_mask")
    found = []
    for row in range(len(next(iter(columns.values())))):
        total = hashlib.sha256()
        for name, column in columns.items():
            values = column[row]
            if mask is not None and column.shape == mask.shape:
                kept = mask[row].bool() | (values != -100 if name == "labels" else False)
                values = values[kept]
            total.update(name.encode() + _bytes(values))
        found.append(total.hexdigest()[:16])
    return found


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + _bytes(tensor.detach())).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
