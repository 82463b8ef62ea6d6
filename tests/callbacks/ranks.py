"""Has a script of this folder run on two ranks on the CPU; each writes what it saw as JSON."""

import json
from pathlib import Path

from trainer_ext.rehearsal.processes import free_port, run_launch

FOLDER = Path(__file__).parent


def on_two_ranks(script, out, *words):
    """What both ranks of `tests/callbacks/SCRIPT OUT WORDS..` wrote into OUT, as rank0.json and rank1.json.

    The ranks are rehearsing processes, so that they may ask for FSDP2 and DeepSpeed.
    """
    (out / "plan.json").write_text("{}")
    typed = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    typed += ["-m", "trainer_ext.rehearsal.process", str(FOLDER / script), str(out), *words]
    code, output = run_launch(typed, out / "log", processes=2, timeout=400, plan=out / "plan.json")
    assert code == 0, output[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
