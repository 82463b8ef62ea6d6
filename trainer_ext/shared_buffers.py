"""DeepSpeed on a CPU leaves a buffer of 69 MB a rank in shared memory, which stays there when it ends."""

import os
from multiprocessing.util import Finalize
from pathlib import Path

FOLDER = Path("/dev/shm")


def own_buffer() -> Path | None:
    """This rank's buffer, named as `csrc/cpu/comm/shm.cpp` does; None in a process that no launcher started."""
    address, port, rank = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    if address is None or port is None or rank is None:
        return None
    return FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def remove_at_exit() -> None:
    """Remove it when this process ends; ranks that are still at work keep what they have mapped."""
    if (buffer := own_buffer()) is not None:
        Finalize(None, buffer.unlink, args=(True,), exitpriority=0)  # of forked processes too, unlike atexit
