"""What a training run recorded: enough to say, step by step, whether another run is the same run.

A recorder is told of the run's beginning, of every optimizer step and of its end; a `Trajectory` is what it
leaves. Floats are stored as they are (JSON keeps every digit of a double), tensors as digests of their bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

SCHEMA = 1
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
        grad_norm: The gradient's norm before clipping.
        learning_rates: The rate of every parameter group, as the step was taken with it.
    """

    step: int
    batch: str
    micro_batches: int
    denominator: float | None
    loss: float
    grad_norm: float
    learning_rates: list[float]


@dataclass
class Trajectory:
    """A whole run.

    Attributes:
        path: Who trained: `manual loop`, or the trainer's class name.
        engine: The class that owned the forward pass, wrapper included.
        world_size: Data-parallel processes.
        initial_weights: Digest of each parameter and buffer before the first step.
        weight_decay: The decay of each parameter's group, by the parameter's name.
        optimizer: The optimizer's class, and what its groups are set to (`betas`, `eps`, ..), by `group.name`.
        steps: Every optimizer step.
        evaluations: Each evaluation's loss and metrics, in order.
        final_weights: As `initial_weights`, after the last step.
        optimizer_state: Digest of each state tensor, as `parameter.key`.
    """

    path: str
    engine: str = ""
    world_size: int = 1
    initial_weights: dict[str, str] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    final_weights: dict[str, str] = field(default_factory=dict)
    optimizer_state: dict[str, str] = field(default_factory=dict)
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

    def begin(self, model: nn.Module, *, engine: str, world_size: int = 1) -> None:
        """Before the first step, with the unwrapped model."""
        self.trajectory.engine, self.trajectory.world_size = engine, world_size
        self.trajectory.initial_weights = digests(model.state_dict())

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
        window = list(window)
        self.trajectory.steps.append(
            Step(
                step=len(self.trajectory.steps) + 1,
                batch=fingerprint(window),
                micro_batches=len(window),
                denominator=denominator,
                loss=loss,
                grad_norm=grad_norm,
                learning_rates=[float(rate) for rate in learning_rates],
            )
        )

    def end(self, model: nn.Module, optimizer: Optimizer, evaluations: Iterable[Mapping[str, float]]) -> Trajectory:
        """After the last step, with the unwrapped model and optimizer; returns the trajectory."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        trajectory = self.trajectory
        trajectory.optimizer = {"class": type(optimizer).__name__}
        for place, group in enumerate(optimizer.param_groups):
            settings = {name: list(v) if isinstance(v, tuple) else v for name, v in group.items()}
            trajectory.optimizer |= {f"{place}.{n}": v for n, v in settings.items() if n not in NOT_SETTINGS}
            for parameter in group["params"]:
                trajectory.weight_decay[names[parameter]] = float(group.get("weight_decay", 0.0))
        trajectory.evaluations = [dict(evaluation) for evaluation in evaluations]
        trajectory.tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        trajectory.final_weights = digests(trajectory.tensors)
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
    return {name: _digest(tensors[name]) for name in sorted(tensors)}


def fingerprint(window: Iterable[Mapping[str, Tensor]]) -> str:
    """One digest for the rows of a step's micro-batches, in order.

    A row counts with the positions that its attention mask keeps (and every label that is not -100), so that it has
    one digest however long the batch it was padded into; a step has one however it was split into micro-batches.
    """
    total = hashlib.sha256()
    for batch in window:
        columns = {name: batch[name].cpu() for name in sorted(batch) if isinstance(batch[name], Tensor)}
        mask = columns.get("attention_mask")
        for row in range(len(next(iter(columns.values())))):
            for name, column in columns.items():
                values = column[row]
                if mask is not None and column.shape == mask.shape:
                    kept = mask[row].bool() | (values != -100 if name == "labels" else False)
                    values = values[kept]
                total.update(name.encode() + _bytes(values))
    return total.hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + _bytes(tensor.detach())).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
