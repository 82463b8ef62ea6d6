"""Writes the record of a run while it trains: a few tensor operations a step, and every so many steps some lines.

A training path tells the `Recorder` of the run's beginning, of every optimizer step, of every evaluation and of the
end. Nothing waits for the device, and ranks do not meet, but where lines are written (after 16 steps, then once a second
or every 64 steps, and with every evaluation and checkpoint).
"""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainer_ext.engine import full_parameters, plain_name
from trainer_ext.parity.digests import Rows, digests, kept_rows
from trainer_ext.parity.environment import code, environment
from trainer_ext.parity.settling import Pending, gradient_norms, joined, json_number, random_states, settled, sharding
from trainer_ext.parity.trajectory import LINES, SCHEMA, WEIGHTS, Trajectory

FIRST_STEPS = 16  # before the first lines are written
STEPS_BETWEEN_LOOKS = 64
MOST_STEPS_BETWEEN_WRITES, SECONDS_BETWEEN_WRITES = 64, 1.0
STEPS_BETWEEN_DIGESTS = 500
# Of a parameter group: recorded elsewhere, or which kernel computes the same thing.
NOT_SETTINGS = (
    "params",
    "name",
    "lr",
    "initial_lr",
    "weight_decay",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
_as_json = json.JSONEncoder(allow_nan=False, default=str).encode


class Recorder:
    """Fills the record of one run, in `folder` or, without one, in memory alone; it touches nothing of the training.

    Args:
        path: Who trains, for people.
        folder: Of the record. One that a run left there goes on where `begin` is told of a resume, else it is replaced.
        header: What the path knows of itself: `seeds`, `arguments`, `dataset`.
        keep_weights: Whether to keep the final weights, which a comparison with a tolerance measures.
    """

    def __init__(
        self,
        path: str,
        folder: Path | str | None = None,
        header: dict[str, Any] | None = None,
        *,
        keep_weights: bool = True,
    ) -> None:
        self.path, self.header, self.keep_weights = path, header or {}, keep_weights
        self.folder = Path(folder) if folder is not None else None
        self.steps = self._began_at = 0
        self._lines: list[dict[str, Any]] = []
        self._pending: list[Pending] = []
        self._norms: list[list[Tensor]] | None = None
        self._rates: list[Any] = []
        self._groups: list[dict[str, Any]] = []  # of the optimizer that `watch` saw
        self._shards: tuple[bool, int] = (False, 1)
        self._model: nn.Module | None = None
        self._unhook: Any = None

    @property
    def began(self) -> bool:
        """Whether the record has begun."""
        return self._model is not None

    def begin(self, model: nn.Module, *, runs_on: dict[str, Any] | None = None, resumed_at: int = 0) -> None:
        """Before the first step; a collective where an engine has split the weights.

        Args:
            model: The model itself, below all wrappers.
            runs_on: What the run stands on; by default this process alone.
            resumed_at: The steps that were taken before, where this run goes on from a checkpoint.
        """
        self._model, self.steps, self._began_at = model, resumed_at, resumed_at
        self._steps_to_write, self._written_at = FIRST_STEPS, time.monotonic()
        weights = digests(dict(full_parameters(model)))
        if not (resumed_at and self._goes_on()):
            self._start()
            single = {"engine": type(model).__name__, "stage": None, "world_size": 1, "local_fraction": 1.0}
            self._write({"kind": "begin", "runs_on": runs_on or single, "initial_weights": weights})
        if resumed_at:
            self._write({"kind": "resume", "step": resumed_at})
            self._write({"kind": "weights", "step": resumed_at, "digests": weights})

    def watch(self) -> None:
        """See each optimizer step from the optimizer itself, where the path does not call `optimizer`."""
        self._unhook = register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_any(optimizer))

    def optimizer(self, optimizer: Optimizer, groups: list[list[nn.Parameter]] | None = None) -> None:
        """What takes the steps, before each: its rates, and the norms of the gradients that it gets.

        Args:
            optimizer: Below all wrappers.
            groups: The model's parameters in each of its groups, where an engine put others in their place.
        """
        if not self._rates:
            self._describe(optimizer, groups)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._norms = gradient_norms(optimizer) if groups is None and self._looks_closely(self.steps + 1) else None

    def step(
        self,
        *,
        window: Iterable[Any],
        denominator: float | None,
        loss: Any,
        grad_norm: Any,
        learning_rates: list[Any] | None = None,
    ) -> None:
        """After an optimizer step; the arguments of `manual_loop.train`'s `on_step`."""
        self.step_of_rows([kept_rows(batch) for batch in window], denominator, [loss], grad_norm, learning_rates)

    def step_of_rows(
        self,
        rows: list[Rows],
        denominator: float | None,
        losses: list[Any],
        grad_norm: Any,
        learning_rates: list[Any] | None = None,
    ) -> None:
        """The same, of what `kept_rows` kept of each micro-batch, and of the micro-batches' parts of the loss."""
        rates = self._rates if learning_rates is None else learning_rates
        self.steps += 1
        rng = random_states() if self._looks_closely(self.steps) else None
        self._pending.append(Pending(rows, denominator, losses, grad_norm, self._norms, rates, rng))
        if len(self._pending) >= self._steps_to_write:
            self.flush()
        if self.steps % STEPS_BETWEEN_DIGESTS == 0:
            self.weights()

    def weights(self) -> None:
        """Digests of the weights as they are now; a collective, as `begin`."""
        assert self._model is not None
        self.flush()
        self._write({"kind": "weights", "step": self.steps, "digests": digests(dict(full_parameters(self._model)))})

    def evaluation(
        self,
        metrics: Mapping[str, float],
        *,
        rows: int | None = None,
        expected: int | None = None,
        training: bool | None = None,
    ) -> None:
        """After an evaluation."""
        self.flush()
        numbers = {name: json_number(value) for name, value in metrics.items()}
        line = {"kind": "evaluation", "step": self.steps, "metrics": numbers, "rows": rows, "expected": expected}
        self._write({**line, "training": training})

    def end(self, optimizer: Optimizer | None = None) -> None:
        """After the last step; a collective, as `begin`.

        Args:
            optimizer: What took the steps, below all wrappers, where its state is whole on this rank.
        """
        assert self._model is not None
        self.flush()
        if self._unhook is not None:
            self._unhook.remove()
        tensors = {name: tensor.clone() for name, tensor in full_parameters(self._model)}  # FSDP2 shards again here
        line: dict[str, Any] = {"kind": "end", "final_weights": digests(tensors)}
        names = self._names()
        if optimizer is not None and _world_size() == 1:
            state = {names[p]: held for p, held in optimizer.state.items() if p in names}
            squares = {name: held["exp_avg_sq"] for name, held in state.items() if "exp_avg_sq" in held}
            line["gradient_scale"] = {name: json_number(value.max().sqrt().item()) for name, value in squares.items()}
            line["optimizer_state"] = digests(
                {
                    f"{n}.{key}": value
                    for n, held in state.items()
                    for key, value in held.items()
                    if torch.is_tensor(value)
                }
            )
        self._write(line)
        if self.keep_weights:
            self.tensors = tensors
            if self.folder is not None and _rank() == 0:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / WEIGHTS)

    def trajectory(self) -> Trajectory:
        """The record so far; read from the folder where there is one."""
        if self.folder is not None:
            return Trajectory.load(self.folder)
        found = Trajectory.of([dict(line) for line in self._lines])
        found.tensors = getattr(self, "tensors", {})
        return found

    def flush(self) -> None:
        """Write the steps that are not written; ranks meet here."""
        if not self._pending:
            return
        everyones: list[Any] = [(time.monotonic() - self._written_at, settled(self._pending))]
        if _world_size() > 1:
            own, everyones = everyones[0], [None] * _world_size()
            dist.all_gather_object(everyones, own)
        slowest = max(seconds for seconds, _ in everyones)  # of all ranks: they meet again after as many steps
        a_while = int(SECONDS_BETWEEN_WRITES * len(self._pending) / slowest)
        self._steps_to_write = min(max(a_while, 1), MOST_STEPS_BETWEEN_WRITES)
        first = self.steps - len(self._pending) + 1
        steps = [joined(ranks, self._shards) for ranks in zip(*(steps for _, steps in everyones), strict=True)]
        self._write(*({"kind": "step", "step": first + place, **step} for place, step in enumerate(steps)))
        self._pending, self._written_at = [], time.monotonic()

    def _describe(self, optimizer: Optimizer, groups: list[list[nn.Parameter]] | None) -> None:
        """The `begin` line's second half, once the optimizer is seen."""
        names = self._names()
        members = groups or [group["params"] for group in optimizer.param_groups]
        self._shards = sharding(members)
        held: dict[str, Any] = {"class": type(optimizer).__name__}
        decay: dict[str, float] = {}
        for place, (group, parameters) in enumerate(zip(optimizer.param_groups, members, strict=True)):
            settings = {name: list(v) if isinstance(v, tuple) else v for name, v in group.items()}
            held |= {f"{place}.{n}": v for n, v in settings.items() if n not in NOT_SETTINGS and _is_plain(v)}
            decay |= {names[p]: float(group.get("weight_decay", 0.0)) for p in parameters if p in names}
        named = [[names[p] for p in parameters if p in names] for parameters in members]
        about = {
            n: [str(p.dtype).removeprefix("torch."), list(getattr(p, "ds_shape", p.shape))] for p, n in names.items()
        }
        self._write({"kind": "begin", "optimizer": held, "weight_decay": decay, "groups": named, "parameters": about})

    def _before_any(self, optimizer: Optimizer) -> None:
        """One of a process's optimizers is about to step; ours is one that holds a parameter of the model, and not a part
        of ours, which steps inside it with some of its groups."""
        own = self._names()
        if any(group is part for group in self._groups for part in optimizer.param_groups):
            if len(optimizer.param_groups) < len(self._groups):
                return
        elif not any(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        self._groups = optimizer.param_groups
        self.optimizer(optimizer)

    def _looks_closely(self, step: int) -> bool:
        """Whether to take what costs as much as all the rest: the groups' norms and the random state."""
        return step - self._began_at <= FIRST_STEPS or step % STEPS_BETWEEN_LOOKS == 0

    def _names(self) -> dict[Tensor, str]:
        assert self._model is not None
        if getattr(self, "_named", None) is None:
            self._named: dict[Tensor, str] = {
                parameter: plain_name(name) for name, parameter in self._model.named_parameters()
            }
        return self._named

    def _goes_on(self) -> bool:
        """Whether there is a record of this schema in the folder, or in memory."""
        if self.folder is None:
            return bool(self._lines)
        try:
            Trajectory.load(self.folder)
        except ValueError:
            return False
        return True

    def _start(self) -> None:
        if self.folder is not None and _rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (LINES, WEIGHTS):
                (self.folder / name).unlink(missing_ok=True)
        self._write(
            {
                "kind": "header",
                "schema": SCHEMA,
                "path": self.path,
                "environment": environment(),
                **code(),
                **self.header,
            }
        )

    def _write(self, *lines: dict[str, Any]) -> None:
        if self.folder is None:
            self._lines += lines
        elif _rank() == 0:
            with (self.folder / LINES).open("a") as file:
                file.write("".join(_as_json(line) + "\n" for line in lines))


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | list | None) and not isinstance(value, Tensor)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
