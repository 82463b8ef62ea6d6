"""`parity record`: a command is started with this module before its script, becomes the script, and records it.

    LAUNCHER .. -m trainer_ext.parity.recorded SCRIPT ARGUMENTS..

The first `Trainer.train` of any subclass, or the first training loop over an `accelerate.Accelerator`, is recorded into
the folder that the environment names.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer_ext.plain_text import masked_words
from trainer_ext.rehearsal.here import as_from_here
from trainer_ext.rehearsal.launch import parse

RECORDING = "TRAINER_EXT_RECORD"  # the record's folder


def record(words: list[str], folder: Path, *, resumed: bool = False) -> int:
    """Run a command with its training recorded into `folder`, new or, of a run that goes on, its record; the exit code.

    Raises:
        ValueError: It is no launch of a Python script, `folder` is taken, or nothing was trained.
    """
    from trainer_ext.parity.trajectory import LINES

    launch, lines = parse(words), folder / LINES
    launch.require_script()
    if resumed and not lines.is_file():
        raise ValueError(f"--resumed: {folder} has no {LINES} to go on with.")
    if not resumed and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output {folder} is taken: name a new folder, or pass --resumed where the command resumes the run of that "
            "record."
        )
    before = lines.stat().st_size if resumed else 0
    inner = ["trainer_ext.parity.recorded", *launch.script, *launch.arguments]
    module = (
        ["-m", *inner] if launch.launcher is None else ["-m", launch.launcher, *launch.options, "--module", *inner]
    )
    variables = as_from_here({**launch.environment, RECORDING: str(folder.resolve())})
    code = subprocess.run([sys.executable, *module], env=variables).returncode
    if code == 0 and not (lines.is_file() and lines.stat().st_size > before):
        raise ValueError(
            f"{' '.join(masked_words(words))} trained nothing that could be recorded: a `Trainer`, or a loop that calls an "
            "Accelerator's prepare, backward and its optimizer's step."
        )
    return code


def main() -> None:
    """Set the recorders up, and become the script."""
    from trainer_ext.rehearsal.process import become

    accelerate_loop = record_this_process(Path(os.environ[RECORDING]))
    become(sys.argv[1:])
    accelerate_loop.finish()


def record_this_process(folder: Path) -> Any:
    """Record the first run of this process; the recorder of a loop over accelerate, to be told when the script ends."""
    from transformers import Trainer

    from trainer_ext.parity.accelerate_recording import AccelerateRecorder
    from trainer_ext.parity.recording import TrainerRecorder

    trained: list[Trainer] = []
    train = Trainer.train

    def recorded(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not trained:
            trained.append(self)
            TrainerRecorder(self, folder)
        return train(self, *args, **kwargs)

    Trainer.train = recorded  # type: ignore[method-assign]
    loop = AccelerateRecorder(folder, busy=lambda: bool(trained))
    loop.install()
    return loop


if __name__ == "__main__":
    main()
