"""One of two real ranks is killed, or stopped for ever: the other ends in time, and says which one it was."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch

from tests.callbacks.processes import run_ranks
from tests.callbacks.stopped_run import started, torchrun
from trainer_ext.lost_ranks import lost_ranks

TIMEOUT, ANSWERS_IN, LAUNCHER = 8, 5, 30  # seconds: `ddp_timeout`, for the others' answer, for torchrun to end a rank


@pytest.mark.parametrize(
    ("number", "bound", "says"),
    [
        (signal.SIGKILL, 20, "RankLostError: A rank is dead or hangs: "),
        (signal.SIGSTOP, 20 + TIMEOUT + ANSWERS_IN + LAUNCHER, "hangs: [Rank 0]: Ranks 1 failed to pass"),
    ],
)
def test_the_others_end(tmp_path, number, bound, says):
    process = started(tmp_path, *torchrun(), str(tmp_path / "run"))
    other = int((tmp_path / "run.pids" / "1").read_text())
    began = time.monotonic()
    try:
        os.kill(other, number)
        assert process.wait(bound + 60) == 1
        assert time.monotonic() - began < bound
        assert says in (tmp_path / "log").read_text()
    finally:
        process.kill()


def error_of(message, group):
    found = lost_ranks(RuntimeError(message), group)
    return found and str(found)


def all_answer():
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    group = torch.distributed.new_group(backend="gloo")
    return error_of("Timed out waiting", group), error_of("shapes differ", group), error_of("Timed out waiting", None)


def test_nothing_is_said_of_ranks_that_answer():
    assert run_ranks(all_answer, 2) == [(None, None, None)] * 2
