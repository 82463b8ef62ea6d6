"""What must answer at once, as processes of their own: `import trainer_ext` and `--help` beside Python's own start, and a
training script to the end of its first optimizer step, with the stock Trainer and with ours.

All processes have the bytecode of what they import, as after an installation; the first round, which does not count,
compiles it.

    python benchmarks/import_time.py

Prints two tables and writes `import_time.json` and `first_step.json`.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory

from pairs import measure, write

HELP = "import sys; sys.argv[1:] = ['--help']; from trainer_ext.cli import main; main()"
AT_ONCE = {"python": "pass", "import trainer_ext": "import trainer_ext", "trainer-ext --help": HELP}
SCRIPT = """
import os, torch
from {package} import {trainer} as Trainer, {arguments} as TrainingArguments
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

class EndAfterOneStep(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        os._exit(0)

model = BertForSequenceClassification(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                                 intermediate_size=256))
rows = [dict(input_ids=torch.arange(16) + row, labels=row % 2) for row in range(64)]
arguments = TrainingArguments("{folder}", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
Trainer(model, arguments, train_dataset=rows, callbacks=[EndAfterOneStep()]).train()
raise SystemExit("not one step was trained")
"""
STOCK = {"package": "transformers", "trainer": "Trainer", "arguments": "TrainingArguments"}
OURS = {"package": "trainer_ext", "trainer": "CustomTrainer", "arguments": "CustomTrainingArguments"}


def seconds(program: str, environment: dict[str, str]) -> dict[str, float]:
    """CPU and wall time of one process that runs `program`, from its start to its end."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall": wall}


def main() -> None:
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}

        def arm(program: str) -> Callable[[], dict[str, float]]:
            return partial(seconds, program, environment)

        write(measure({name: arm(program) for name, program in AT_ONCE.items()}, "python", rounds=121), "import_time")
        scripts = {names["trainer"]: arm(SCRIPT.format(folder=folder, **names)) for names in (STOCK, OURS)}
        write(measure(scripts, "Trainer", rounds=8), "first_step")


if __name__ == "__main__":
    main()
