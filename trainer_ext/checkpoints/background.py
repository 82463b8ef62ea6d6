"""The end of a save beside the training: on the disk, hashed, in its place.

All files of a checkpoint are written before: they are in the page cache, which is the memory that they are staged in. What
takes the disk's time then runs in a thread, one save at a time, and says at the next save or at the end what went wrong.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_all_ranks

logger = logging.get_logger(__name__)


class Background:
    """At most one save that is on its way to the disk. All ranks make one, and call its methods together.

    Attributes:
        gather: What every process holds, over a group of its own: training goes on over the others meanwhile.
    """

    def __init__(self) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        group = torch.distributed.new_group(backend="gloo") if several else None
        self.gather: Callable[[Any], list[Any]] = partial(of_all_ranks, group=group)
        self._ending: Future[None] | None = None
        self._then: Callable[[], None] = lambda: None

    def start(self, end: Callable[[], None], then: Callable[[], None]) -> None:
        """Have `end` done in a thread, and `then` by the one that waits for it."""
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._ending, self._then = pool.submit(end), then
        pool.shutdown(wait=False)

    def finish(self) -> None:
        """Wait for what was started, if anything was.

        Raises:
            CheckpointNotSavedError: It was not saved.
        """
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.result()
            self._then()

    def finish_after_an_error(self) -> None:
        """Wait, and only log what went wrong: the training has ended with an error of its own."""
        ending, self._ending = self._ending, None
        if ending is not None:
            wait([ending])
            if (error := ending.exception()) is not None:
                logger.error(str(error))
