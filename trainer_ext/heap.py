"""Freed memory that stays with the process, so that a training step does not ask the system for it again.

On a CPU the tensors of a step come from glibc's `malloc`, which gives large blocks, and the end of its heap, back to the
system as soon as they are free. The next step asks for them again, and the kernel clears every page anew.
"""

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")  # by which glibc is told from outside


def can_keep_freed_memory() -> bool:
    """Whether this process has glibc's `malloc`, and nobody has told it what to keep."""
    has_mallopt = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
    told = any(name in os.environ for name in OWN) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    return has_mallopt and not told


def keep_freed_memory() -> None:
    """Have `malloc` take all blocks from its heap, and give nothing of that back, for the rest of the process.

    Where that cannot be, or the environment says otherwise, a line is logged and nothing done.
    """
    if not can_keep_freed_memory():
        logger.warning(
            "keep_freed_memory has no effect: this process has no malloc of glibc, or MALLOC_* or GLIBC_TUNABLES say what "
            "it keeps."
        )
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
