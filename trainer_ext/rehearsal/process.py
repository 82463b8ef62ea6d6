"""What a launcher starts in a rehearsal: the script itself, on the CPU, with its training watched.

    LAUNCHER .. -m trainer_ext.rehearsal.process SCRIPT ARGUMENTS..
    LAUNCHER .. -m trainer_ext.rehearsal.process -m MODULE ARGUMENTS..

The plan is a JSON file that the environment names; one without `steps` has the script run as it is, on the CPU.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from trainer_ext.gloo_threads import outlast_them
from trainer_ext.rehearsal import on_cpu
from trainer_ext.shared_buffers import remove_at_exit


def main() -> None:
    """Set the process up, and become the script."""
    os.environ.update(on_cpu.ENVIRONMENT)
    from trainer_ext.engine import REHEARSING

    plan = json.loads(Path(os.environ[REHEARSING]).read_text())
    on_cpu.install()
    remove_at_exit()
    outlast_them()

    from trainer_ext.rehearsal.watch import watch

    watch(plan)
    become(sys.argv[1:])


def become(words: list[str]) -> None:
    """Run a script, or `-m` and a module, as if this process had been started with it."""
    local_rank = [word for word in words[:1] if word.startswith("--local_rank")]  # DeepSpeed's launcher puts it first
    script, *arguments = words[len(local_rank) :]
    if script == "-m":
        module, *arguments = arguments
        sys.argv = [module, *local_rank, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *local_rank, *arguments]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
