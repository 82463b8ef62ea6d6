"""Has a script of the tests run on two ranks on the CPU, as if a launcher had started it."""

import json
from pathlib import Path

from tests.callbacks.processes import run_ranks, settle_on_cpu
from trainer_ext.engine import REHEARSING
from trainer_ext.rehearsal.process import become

FOLDER = Path(__file__).parent


def run_script(script, *words, environment=None):
    """Run `tests/callbacks/SCRIPT WORDS..` on two ranks, as in a rehearsal, where FSDP2 and DeepSpeed run on a CPU."""
    command = [str(word) for word in (FOLDER / script, *words)]
    run_ranks(_script, 2, command, environment={REHEARSING: "on the CPU", **(environment or {})}, timeout=400)


def on_two_ranks(script, out, *words, environment=None):
    """What both ranks of `tests/callbacks/SCRIPT OUT WORDS..` wrote into OUT, as rank0.json and rank1.json."""
    run_script(script, out, *words, environment=environment)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def _script(command):
    settle_on_cpu(deepspeed=True)
    become(command)
