"""Real processes: start a launch, wait for it, end what is left of it, and say why it failed."""

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from trainer_ext.engine import REHEARSING
from trainer_ext.rehearsal.here import as_from_here


def run_launch(
    words: list[str],
    log: Path,
    *,
    processes: int,
    timeout: float,
    plan: Path | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a launcher to its end; its exit code and what it and its processes printed.

    Args:
        words: The command.
        log: Where the output goes.
        processes: How many it starts, which share this host's cores.
        timeout: Seconds, after which all of them are ended.
        plan: What rehearsing processes read.
        environment: Variables besides this process's own.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    variables = {"OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1", **as_from_here(environment or {})}
    if plan is not None:
        variables[REHEARSING] = str(plan)
    remove_abandoned_locks()
    with log.open("w") as file:
        process = subprocess.Popen(words, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            file.write(f"\nnot done after {timeout:g} seconds, and ended\n")
            code = -signal.SIGKILL
        finally:
            if process.poll() is None:
                end(process)
    return code, log.read_text(errors="replace")


def remove_abandoned_locks() -> None:
    """Remove the locks of operators' builds that no process holds any more.

    Torch builds DeepSpeed's operators behind a lock file. A process that is killed there leaves it, and every later
    launch waits for it in silence, for ever.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        if not any(_holds(process, lock) for process in psutil.process_iter()):
            lock.unlink(missing_ok=True)


def _holds(process: psutil.Process, file: Path) -> bool:
    try:
        return any(opened.path == str(file) for opened in process.open_files())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and all that it started; torchrun gives every rank a session of its own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)


def why(output: str, code: int) -> str:
    """The first error that a rank raised, or the signal that ended it, from a launch's output."""
    lines = [line.strip() for line in output.splitlines()]
    plain = [line.split("]:", 1)[1].strip() if line.startswith("[rank") and "]:" in line else line for line in lines]
    errors = [line for line in plain if _is_error(line)]
    return errors[0] if errors else next((line for line in reversed(plain) if line.strip("=-*")), f"exit code {code}")


def _is_error(line: str) -> bool:
    """Whether a line ends a traceback, or is a script's own one-line complaint."""
    name, colon, said = line.partition(":")
    kind = name.rsplit(".", 1)[-1]
    raised = bool(colon and said) and kind.isidentifier() and kind.endswith(("Error", "Exception"))
    aborted = (
        line.startswith(("terminate called", "Fatal Python error", "traceback : Signal")) and "SIGTERM" not in line
    )
    return (
        (raised and kind != "ChildFailedError") or aborted or ": error: " in line or line.startswith("not done after")
    )


def free_port() -> int:
    """A port that nothing on this host listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
