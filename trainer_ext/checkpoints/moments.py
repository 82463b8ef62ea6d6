"""The optimizer's state in a checkpoint of any engine: what it keeps of each parameter, read when it is asked for.

    moments = open_moments(Path("checkpoint-500"), groups)
    moments["classifier.weight"]["exp_avg"].read()

The names of the parameters in each group come from the checkpoint's record of its run: a plain optimizer's file has numbers
in their place.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from trainer_ext.checkpoints.trusted import load
from trainer_ext.checkpoints.weights import Stored, Weights, sharded
from trainer_ext.checkpoints.zero_weights import zero_moments
from trainer_ext.engine import plain_name

Moments = dict[str, Weights]  # by the parameter, then by what is kept of it: exp_avg, step, ..
SHARDED = "optimizer_0"  # accelerate's folder of torch.distributed.checkpoint
PREFIX = "optimizer.state."


def open_moments(folder: Path, groups: list[list[str]]) -> Moments:
    """Find the optimizer's state of a checkpoint whose pickles were checked.

    Args:
        folder: A checkpoint of a `Trainer`.
        groups: The names of the parameters in each of the optimizer's groups.

    Raises:
        ValueError: There is none, or it does not fit together.
    """
    if (folder / "latest").is_file():
        tag = folder / (folder / "latest").read_text().strip()
        if list(tag.glob("*_optim_states.pt")):
            return {name: {key: Stored(*p) for key, p in kept.items()} for name, kept in zero_moments(tag).items()}
        return _by_number(load(tag / "mp_rank_00_model_states.pt")["optimizer"], groups)
    if (folder / SHARDED).is_dir():
        found: Moments = {}
        for key, stored in sharded(folder / SHARDED)[0].items():
            if key.startswith(PREFIX):
                name, _, kept = key.removeprefix(PREFIX).rpartition(".")
                found.setdefault(plain_name(name), {})[kept] = stored
        return found
    if (folder / "optimizer.bin").is_file():
        state = load(folder / "optimizer.bin")["state"]
        return {plain_name(name): _stored(kept) for name, kept in state.items()}
    if (folder / "optimizer.pt").is_file():
        return _by_number(load(folder / "optimizer.pt"), groups)
    raise ValueError(f"{folder} holds no optimizer's state that is known: it was saved with save_only_model.")


def _by_number(state: dict[str, Any], groups: list[list[str]]) -> Moments:
    """Of torch's optimizers, which number their parameters through the groups."""
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    names = dict(zip(numbers, chain.from_iterable(groups), strict=True))
    return {names[number]: _stored(kept) for number, kept in state["state"].items()}


def _stored(kept: dict[str, Any]) -> Weights:
    tensors = {key: torch.as_tensor(value).detach() for key, value in kept.items()}
    return {key: Stored(tensor.shape, tensor.dtype, tensor.clone) for key, tensor in tensors.items()}
