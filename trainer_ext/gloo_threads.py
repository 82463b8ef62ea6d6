"""A rank over gloo that ends too soon after a collective is aborted; here it waits a moment.

The tensors of a collective are let go of by a thread of gloo's, which takes Python's lock for that. If Python is going
down by then, it ends the thread in the middle of a C++ function that cannot be left: the process aborts (SIGABRT,
"terminate called without an active exception"), when all is trained and saved, and its launcher says that it failed. On a
busy host these were 2 of 69 ranks, with PyTorch 2.13.
"""

import atexit
import functools
import time

SECONDS = 0.2  # a thread needs microseconds, once it gets a core


@functools.cache
def outlast_them() -> None:
    """Have this process wait `SECONDS` when it exits, with the lock free. Any number of calls are one."""
    atexit.register(time.sleep, SECONDS)
