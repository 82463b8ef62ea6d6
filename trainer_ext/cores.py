"""The cores of a host, divided among the ranks that train on it.

Without it the threads of all ranks move over all cores, and each rank starts as many as the host has cores, or one alone:
`torchrun` says `OMP_NUM_THREADS=1` where nobody else does. What a user or a launcher has set stays as it is.
"""

import logging
import os

import torch
from accelerate.utils import get_cpu_distributed_information

logger = logging.getLogger(__name__)

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def divide_cores() -> None:
    """Keep this process, and every thread that it has, on its share of the cores that it may run on; as many threads.

    Does nothing where one process trains on this host. Cores that the launcher has chosen for this rank, so that they are
    not its parent's, are all its own. The number of threads stays where the environment says it.
    """
    launch = get_cpu_distributed_information()
    ranks = int(os.environ.get("LOCAL_SIZE", launch.local_world_size))  # DeepSpeed's launcher has a name of its own
    if ranks < 2:
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks and os.sched_getaffinity(os.getppid()) == set(cores):
        cores = share(cores, launch.local_rank, ranks)
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
    if not any(name in os.environ for name in THREADS):
        torch.set_num_threads(len(cores))
    elif torch.get_num_threads() < len(cores):
        logger.warning(
            "rank %d computes on %d of its %d cores, as OMP_NUM_THREADS or MKL_NUM_THREADS says. torchrun and "
            "accelerate set 1 where nobody else does. Set OMP_NUM_THREADS=%d.",
            launch.rank,
            torch.get_num_threads(),
            len(cores),
            len(cores),
        )


def share(cores: list[int], rank: int, ranks: int) -> list[int]:
    """Rank `rank`'s of `ranks` neighbouring parts, whose sizes differ by one core at most."""
    return cores[len(cores) * rank // ranks : len(cores) * (rank + 1) // ranks]
