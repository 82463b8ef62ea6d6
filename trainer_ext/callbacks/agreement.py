"""One answer on all ranks: what a callback decides must be the same everywhere, or the ranks wait for each other.

Numbers of one rank go in; the same numbers come out on every rank. Without several processes nothing is sent.
"""

from typing import Any

import torch
from torch import Tensor


def of_first_rank(values: list[float], device: torch.device) -> list[float]:
    """Rank 0's `values` on every rank: a collective, to be called by all with lists of one length.

    Args:
        values: Numbers, sent in float64.
        device: One that the process group can send from, `args.device` in a callback.
    """
    if not several_processes():
        return values
    sent = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.broadcast(sent, src=0)
    return sent.tolist()


def largest_of_all(value: Tensor) -> Tensor:
    """The elementwise maximum over all ranks of finite numbers: a collective, to be called by all."""
    if several_processes():
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value


def of_all_ranks(value: Any, group: Any = None) -> list[Any]:
    """What every rank holds, in the order of the ranks: a collective of pickled objects, to be called by all.

    Args:
        value: What this rank holds.
        group: The process group to send over; None is the default one.
    """
    if not several_processes():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def several_processes() -> bool:
    """Whether there are other ranks to agree with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
