"""A rank that is dead or hangs: the others end in time, and say which one it is.

An error of a collective comes in; the ranks that do not answer come out. How long a collective waits is `ddp_timeout`.
"""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer

ANSWERS_IN = timedelta(seconds=5)
OF_A_COLLECTIVE = re.compile(r"gloo|nccl|process group|connection (closed|reset)|timed out", re.IGNORECASE)


class RankLostError(RuntimeError):
    """A rank is dead or hangs, and the run cannot go on; it can from its last checkpoint."""


def wait_as_long_as_asked(trainer: "Trainer") -> None:
    """Have collectives wait for `ddp_timeout`, which transformers 5.23 does not tell accelerate on a CPU."""
    if trainer.args.world_size > 1:
        timeout = timedelta(seconds=trainer.args.ddp_timeout)
        torch.distributed.distributed_c10d._set_pg_timeout(timeout)


def lost_ranks(error: RuntimeError, group: Any) -> RankLostError | None:
    """What to raise in the place of an error of a collective; None where it is another, or all ranks answer.

    Args:
        error: Of the training, on this rank.
        group: A gloo group of all ranks; None where there is one.
    """
    if group is None or not OF_A_COLLECTIVE.search(str(error)):
        return None
    try:
        torch.distributed.monitored_barrier(group, ANSWERS_IN, wait_all_ranks=True)
    except RuntimeError as who:
        return RankLostError(f"A rank is dead or hangs: {who}. Resume from the last checkpoint.")
    return None
