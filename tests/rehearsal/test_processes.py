"""Real processes: what they are given, their output, their end, and the locks that killed ones leave behind."""

import json
import os
import signal
import socket
import sys

import psutil
import pytest

from trainer_ext.engine import REHEARSING
from trainer_ext.rehearsal.processes import free_port, remove_abandoned_locks, run_launch, why

# A launcher as torchrun is one: its rank is in a session of its own, which no signal to the launcher's reaches.
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(600)
"""


def run(code, tmp_path, timeout=60.0, **options):
    return run_launch(
        [sys.executable, "-c", code], tmp_path / "log", **{"processes": 2, "timeout": timeout, **options}
    )


def test_output_and_exit_code(tmp_path):
    assert run("import sys; print('said'); sys.exit(3)", tmp_path) == (3, "said\n")
    assert run(r"import sys; sys.stderr.buffer.write(b'\xff')", tmp_path) == (0, "\ufffd")


def test_what_processes_are_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PATH", "/usr/bin")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    _, output = run(show, tmp_path, plan=tmp_path / "plan.json", environment={"NCCL_DEBUG": "INFO"})
    found = json.loads(output)
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["PYTHONPATH"] == os.pathsep.join([os.getcwd(), "/elsewhere"])
    assert found["PATH"] == os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin"])
    assert found[REHEARSING] == str(tmp_path / "plan.json")


@pytest.mark.parametrize(("processes", "threads"), [(2, max(1, (os.cpu_count() or 1) // 2)), (1000, 1)])
def test_the_ranks_share_the_cores(tmp_path, monkeypatch, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, output = run("import os; print(os.environ['OMP_NUM_THREADS'])", tmp_path, processes=processes)
    assert int(output) == threads


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    code, output = run(LAUNCHER, tmp_path, timeout=3.0)
    rank = int(output.split()[0])
    assert not psutil.pid_exists(rank) or psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
    assert code == -signal.SIGKILL
    assert why(output, code) == "not done after 3 seconds, and ended"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: too few rows\nChildFailedError: x\n",
            "ValueError: too few rows",
        ),
        ("Traceback\n  File x\nValueError: batch 3\nTraceback\nRuntimeError: peer left\n", "ValueError: batch 3"),
        ("torch.OutOfMemoryError: too big\n", "torch.OutOfMemoryError: too big"),
        ("a.ChildFailedError: x\nKeyError: 'loss'\n", "KeyError: 'loss'"),
        ("x\nrun.py: error: unrecognized arguments: --a\n", "run.py: error: unrecognized arguments: --a"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nlast words\n\n", "last words"),
        ("INFO: all is well\n=====\n", "INFO: all is well"),
        (
            "terminate called after throwing an instance of 'gloo::IoException'\n",
            "terminate called after throwing an instance of 'gloo::IoException'",
        ),
        (
            " traceback : Signal 15 (SIGTERM)\n  traceback : Signal 6 (SIGABRT) received by PID 2\n=====\n",
            "traceback : Signal 6 (SIGABRT) received by PID 2",
        ),
        ("", "exit code 7"),
    ],
)
def test_the_first_error_of_a_rank_is_the_reason(output, said):
    assert why(output, 7) == said


def test_a_free_port():
    with socket.socket() as one:
        port = free_port()
        one.bind(("127.0.0.1", port))
        assert one.getsockname() == ("127.0.0.1", port)


def test_a_lock_that_nobody_holds_is_removed(tmp_path, monkeypatch):
    """As torch takes it: the file is made and kept open until the build is done."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    remove_abandoned_locks()
    assert lock.exists()
    os.close(held)
    remove_abandoned_locks()
    assert not lock.exists()
