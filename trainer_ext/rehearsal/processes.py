"""Real processes: start a launch, wait for it, end what is left of it, and say why it failed."""

import os
import signal
import socket
import subprocess
from pathlib import Path

from trainer_ext.engine import REHEARSING


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
    here = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    variables = {"OMP_NUM_THREADS": str(threads), **os.environ, **(environment or {}), "PYTHONPATH": here}
    if plan is not None:
        variables[REHEARSING] = str(plan)
    with log.open("w") as file:
        process = subprocess.Popen(words, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            file.write(f"\nnot done after {timeout:g} seconds, and ended\n")
            code = -signal.SIGKILL
        finally:
            if process.poll() is None:  # the launcher and its ranks are one process group
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_text(errors="replace")


def why(output: str, code: int) -> str:
    """The first error that a rank raised, from a launch's output."""
    lines = [line.strip() for line in output.splitlines()]
    plain = [line.split("]:", 1)[1].strip() if line.startswith("[rank") and "]:" in line else line for line in lines]
    errors = [line for line in plain if _is_error(line)]
    return errors[0] if errors else next((line for line in reversed(plain) if line), f"exit code {code}")


def _is_error(line: str) -> bool:
    """Whether a line ends a traceback, or is a script's own one-line complaint."""
    name, colon, said = line.partition(":")
    kind = name.rsplit(".", 1)[-1]
    raised = bool(colon and said) and kind.isidentifier() and kind.endswith(("Error", "Exception"))
    return (raised and kind != "ChildFailedError") or ": error: " in line or line.startswith("not done after")


def free_port() -> int:
    """A port that nothing on this host listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
