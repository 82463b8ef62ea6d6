"""What `parity record` puts before a script: the process becomes the script, and its training is recorded.

    LAUNCHER .. -m trainer_ext.parity.recorded SCRIPT ARGUMENTS..

The first `Trainer.train` of any subclass, or the first training loop over an `accelerate.Accelerator`, is recorded into
the folder that the environment names.
"""

import os
import sys
from pathlib import Path
from typing import Any

RECORDING = "TRAINER_EXT_RECORD"  # the record's folder


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
