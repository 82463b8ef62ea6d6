"""What is kept of a step until it is written, and how it becomes plain values, of one rank and of all."""

import hashlib
import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer_ext.parity.digests import Rows, as_text


@dataclass
class Pending:
    """A step that is not written yet; its tensors may still be on their way."""

    rows: list[Rows]
    denominator: Any
    losses: list[Any]
    grad_norm: Any
    norms: list[list[Tensor]] | None
    learning_rates: list[Any]
    rng: list[Tensor] | None


def gradient_norms(optimizer: Optimizer) -> list[list[Tensor]]:
    """The norms of each group's gradients: of this rank's parts where they are sharded."""
    found = []
    for group in optimizer.param_groups:
        grads = [grad for parameter in group["params"] if (grad := parameter.grad) is not None]
        grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        found.append(list(torch._foreach_norm(grads)) if grads else [])
    return found


def random_states() -> list[Tensor]:
    """The states of torch's generators, of the CPU and of the current accelerator."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def sharding(members: list[list[nn.Parameter]]) -> tuple[bool, int]:
    """Whether gradients are sharded over the ranks, and how many ranks hold the same shard."""
    tensor = next((p for group in members for p in group if isinstance(p, DTensor)), None)
    if tensor is None:
        return False, 1
    mesh = tensor.device_mesh
    shards = math.prod(mesh.size(i) for i, placed in enumerate(tensor.placements) if placed.is_shard())
    return True, mesh.size() // shards


def settled(steps: list[Pending]) -> list[dict[str, Any]]:
    """A rank's steps as plain values; here the device is waited for."""
    texts = iter(as_text([rows for step in steps for rows in step.rows]))
    squares = _squared_norms([step.norms for step in steps])
    return [_settled_step(step, list(islice(texts, len(step.rows))), squares[i]) for i, step in enumerate(steps)]


def _squared_norms(steps: list[list[list[Tensor]] | None]) -> list[list[float] | None]:
    """The square of each group's gradient norm, in every step."""
    norms = [norm for groups in steps for group in groups or [] for norm in group]
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.cpu() for norm in norms]
    numbers = iter(torch.stack(norms).tolist() if norms else [])
    return [
        None if groups is None else [sum(norm * norm for norm in islice(numbers, len(group))) for group in groups]
        for groups in steps
    ]


def _settled_step(step: Pending, texts: list[tuple[str, str]], squares: list[float] | None) -> dict[str, Any]:
    return {
        "rows": [inputs for inputs, _ in texts],
        "labels": [labels for _, labels in texts],
        "rng": step.rng and _hashed(b"".join(state.numpy().tobytes() for state in step.rng)),
        "denominator": None if step.denominator is None else float(step.denominator),
        "loss": float(sum(step.losses)),
        "grad_norm": None if step.grad_norm is None else float(step.grad_norm),
        "squares": squares,
        "learning_rates": [float(rate) for rate in step.learning_rates],
    }


def joined(ranks: tuple[dict[str, Any], ...], shards: tuple[bool, int]) -> dict[str, Any]:
    """One step of all ranks.

    Rows stand as one process would have drawn them: accelerate deals the micro-batches of one order out in turn, first
    each rank's first, then each rank's second.
    """
    first, (sharded, replicas) = ranks[0], shards
    texts = {
        name: [text for turn in zip(*(rank[name] for rank in ranks), strict=True) for text in turn]
        for name in ("rows", "labels")
    }
    squares = first["squares"]
    if squares is not None and sharded:
        squares = [sum(parts) / replicas for parts in zip(*(rank["squares"] for rank in ranks), strict=True)]
    states = [rank["rng"] for rank in ranks]
    return {
        "rows": "".join(texts["rows"]),
        "labels": "".join(texts["labels"]),
        "sizes": [len(text) // 8 for text in texts["rows"]],
        "rng": states[0] if len(states) == 1 or states[0] is None else _hashed("".join(states).encode()),
        "denominator": json_number(first["denominator"]),
        "loss": json_number(sum(rank["loss"] for rank in ranks) / len(ranks)),
        "grad_norm": json_number(first["grad_norm"]),
        "group_norms": squares and [json_number(math.sqrt(s) if s >= 0 else s) for s in squares],
        "learning_rates": first["learning_rates"],
    }


def _hashed(state: bytes) -> str:
    return hashlib.blake2b(state, digest_size=8).hexdigest()


def json_number(value: float | None) -> float | str | None:
    """A number as JSON takes it: one that is not finite as a text."""
    return value if value is None or math.isfinite(value) else str(float(value))
