"""Runs that die: processes that train and save, and what kills them where.

A run's name and a way to die go in; how its processes ended, and what they were at, comes out.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, default_data_collator

from tests.callbacks.processes import CONTEXT, DEEPSPEED, settle_on_cpu, zero
from tests.checkpoints.test_on_ranks import SHARDED
from tests.conftest import rows, tiny_model
from tests.soak.test_checkpoint_faults import end
from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback
from trainer_ext.checkpoints.manifest import MANIFEST
from trainer_ext.checkpoints.resume import checkpoints_in
from trainer_ext.checkpoints.write import SAVING
from trainer_ext.engine import runs_on
from trainer_ext.rehearsal.processes import free_port, remove_abandoned_locks
from trainer_ext.shared_buffers import FOLDER

STEPS, SAVE_STEPS = 30, 2
IN_A_SAVE, SEEN_SAVING, ANY_TIME = "in a save", "seen saving", "at any time"
STOCK = "stock, one process"
RUNS = {  # class, ranks, environment, DeepSpeed config, kills, file operations of a save
    "one process": (CustomTrainer, 1, {}, None, 120, 90),
    "DDP, 2 ranks": (CustomTrainer, 2, {}, None, 60, 90),
    "ZeRO-2, 2 ranks": (CustomTrainer, 2, DEEPSPEED, zero(2), 10, 90),
    "FSDP2 sharded, 2 ranks": (CustomTrainer, 2, SHARDED, None, 12, 120),
    STOCK: (Trainer, 1, {}, None, 12, 40),
}
FILES_WRITTEN, MANIFEST_WRITTEN = "files are written", "the manifest is written"
REMOVED = "leftovers or an older one are removed"
OUTSIDE = ("it starts or resumes", "it trains")  # all other phases are of a save


class Told(TrainerCallback):
    """Each finished step, a line in a file."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with Path(f"{args.output_dir}.steps").open("a") as file:
                file.write(f"{state.global_step}\n")


def mortal(cls, out, fatal):
    """A class that dies in a save before its `fatal`-th operation on files, counted from the process's begin."""
    left, saving = fatal, False

    def watch(event, arguments):
        nonlocal left
        if not (saving and event in PHASES and of_run(out, *arguments)):
            return
        left -= 1
        if left == 0:
            Path(f"{out}.phase").write_text(PHASES[event](*arguments))
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal(cls):
        def _save_checkpoint(self, model, trial):
            nonlocal saving
            saving = True
            super()._save_checkpoint(model, trial)
            saving = False

    if fatal:
        sys.addaudithook(watch)
    return Mortal


def of_run(out, path, *more):
    """Whether an operation is on a run's folder, by a path or, as `rmtree` does, by a name in an open folder."""
    return str(path).startswith(f"{out}/") or (isinstance(path, str) and "/" not in path and more[-1:] > (0,))


def opened(path, mode, flags):
    if Path(path).name.startswith(MANIFEST):
        return MANIFEST_WRITTEN
    if flags & (os.O_WRONLY | os.O_RDWR):
        return FILES_WRITTEN
    return "files are hashed" if flags & os.O_NONBLOCK else "files are brought to the disk"


def renamed(source, target, *_):
    if Path(target).parent.name == "removed":
        return REMOVED
    return "it is put in its place" if Path(source).name.startswith("checkpoint-") else MANIFEST_WRITTEN


PHASES = {
    "open": opened,
    "os.rename": renamed,
    "os.mkdir": lambda *_: "it begins",
    **dict.fromkeys(("os.remove", "os.rmdir"), lambda *_: REMOVED),
}


def live(out, run, fatal, variables):
    """Train to the end, from the newest good checkpoint; what the end is, in a file."""
    os.environ.update(variables)
    cls, _, _, config, *_ = RUNS[run]
    settle_on_cpu(config)
    torch.set_num_threads(1)
    args = CustomTrainingArguments(
        output_dir=out, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=SAVE_STEPS,
        save_total_limit=2, max_steps=STEPS, logging_steps=1, log_level="error", per_device_train_batch_size=2,
        deepspeed=config,
    )  # fmt: skip
    trainer = mortal(cls, out, fatal)(
        model=tiny_model(attn_implementation="eager"),
        args=args,
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[Told(), *([EMACallback()] if cls is CustomTrainer else [])],
    )
    trainer.train(resume_from_checkpoint=True if checkpoints_in(Path(out)) else None)
    digest, on = end(trainer), runs_on(trainer)
    if trainer.is_world_process_zero():
        Path(f"{out}.end").write_text(json.dumps([digest, on.engine, on.world_size]))


class Life:
    """The processes of one run from a start to an end, which a kill may be."""

    def __init__(self, out, run, fatal=0, victim=0):
        _, ranks, environment, self.config, *_ = RUNS[run]
        self.port, self.processes, self.told = free_port(), [], len(told(out))
        for rank in range(ranks):
            variables = {} if ranks == 1 else {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, **environment,
            }  # fmt: skip
            dies = fatal if rank == victim else 0
            variables = {name: str(value) for name, value in variables.items()}
            self.processes.append(CONTEXT.Process(target=live, args=(str(out), run, dies, variables)))
            self.processes[-1].start()

    def goes_on(self):
        return all(process.is_alive() for process in self.processes)

    def ends_well(self):
        return any(process.exitcode == 0 for process in self.processes)

    def kill(self):
        for process in self.processes:
            process.kill()

    def codes(self):
        """How each process ended; what DeepSpeed leaves is removed."""
        for process in self.processes:
            process.join(120)
            assert process.exitcode is not None, "a rank hangs"
        if self.config:
            remove_abandoned_locks()
            for buffer in FOLDER.glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
                buffer.unlink()
        return [process.exitcode for process in self.processes]


def told(out):
    with suppress(FileNotFoundError):
        return Path(f"{out}.steps").read_text().split("\n")[:-1]
    return []


def kill_once(out, run, way, drawn):
    """One life that is to be killed; its exit codes, and the phase in which it died."""
    _, ranks, _, config, _, operations = RUNS[run]
    victim, phase = drawn.randrange(ranks), Path(f"{out}.phase")
    phase.unlink(missing_ok=True)
    fatal = drawn.randint(1, operations if victim == 0 else 12) if way == IN_A_SAVE else 0
    life = Life(out, run, fatal, victim)
    if way == IN_A_SAVE:
        while life.goes_on():
            time.sleep(0.001)
        time.sleep(drawn.uniform(0, 0.05))
    else:
        least = drawn.randint(0, 9) if way == SEEN_SAVING else drawn.randint(1 if config else 0, 7)
        reached = seen_saving if way == SEEN_SAVING else trained
        while life.goes_on() and not reached(out, life, least):
            time.sleep(0.0003)
        time.sleep(drawn.uniform(0, 0.005) if way == SEEN_SAVING or least else drawn.uniform(0, 0.6))
    if not life.ends_well():
        life.kill()
    codes = life.codes()
    return codes, phase.read_text() if phase.exists() else on_the_disk(out, life)


def seen_saving(out, life, files):
    with suppress(FileNotFoundError):  # it is put in its place meanwhile
        return (
            trained(out, life, 1) and sum(len(list(folder.iterdir())) for folder in (out / SAVING).iterdir()) >= files
        )
    return False


def trained(out, life, steps):
    return len(told(out)) - life.told >= steps


def on_the_disk(out, life):
    """The phase that a kill from outside hit, by what it left."""
    beside = next((out / SAVING).glob("checkpoint-*"), None)
    if beside is None:
        return OUTSIDE[len(told(out)) > life.told]
    return MANIFEST_WRITTEN if (beside / MANIFEST).exists() else FILES_WRITTEN
