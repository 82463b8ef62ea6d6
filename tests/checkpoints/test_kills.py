"""`kill -9` in the middle of saves: what is there can always be gone on from, and the run ends as it would have.

Real processes are killed by a real SIGKILL, each when a save has written another number of files.
"""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_utils import rotate_checkpoints

from tests.callbacks.processes import CONTEXT, exit_code
from tests.conftest import rows, tiny_model
from trainer_ext.checkpoints.manifest import verify, write_manifest
from trainer_ext.checkpoints.resume import newest_good, step_of
from trainer_ext.checkpoints.write import SAVING, remove_leftovers, rotate

STEPS = 40
KILLS = 9  # after none of the files of a checkpoint to after all of them but the manifest


class Told(TrainerCallback):
    """Each finished step, a byte in a file."""

    def on_step_end(self, args, state, control, **kwargs):
        Path(f"{args.output_dir}.steps").write_text(str(state.global_step))


def train(out):
    """Train to the end, a checkpoint after every step, from the newest good one."""
    torch.set_num_threads(1)
    from trainer_ext import CustomTrainer, CustomTrainingArguments

    args = CustomTrainingArguments(
        output_dir=out,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        max_steps=STEPS,
        logging_steps=STEPS,
        dataloader_pin_memory=False,
        log_level="error",
    )
    made = CustomTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[Told()],
    )
    made.train(resume_from_checkpoint=True if newest_good(Path(out)) else None)
    torch.save(made.model.state_dict(), f"{out}.end")


def started(out):
    Path(f"{out}.steps").unlink(missing_ok=True)
    process = CONTEXT.Process(target=train, args=(str(out),))
    process.start()
    return process


def in_a_save(out, process, files):
    """Wait until a save of this process is under way that has written so many files."""
    folder, told = out / SAVING, Path(f"{out}.steps")
    while process.is_alive():
        with suppress(FileNotFoundError):  # it is put in its place meanwhile
            if told.exists() and len([path for path in folder.iterdir() for path in path.iterdir()]) >= files:
                return
        time.sleep(0.0005)


def test_every_kill_leaves_a_checkpoint_to_go_on_from(tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = started(whole)
    process.join()
    assert process.exitcode == 0
    drawn, saving, at = random.Random(0), 0, []
    for files in range(KILLS):
        process = started(out)
        in_a_save(out, process, files)
        time.sleep(drawn.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        saving += (out / SAVING).exists()
        done = int(Path(f"{out}.steps").read_text())
        choice = newest_good(out)
        step = step_of(choice.folder.name) if choice else 0
        assert done - step in (0, 1)
        assert choice is None or not choice.passed_over
        at.append(step)
    assert saving >= KILLS // 2
    assert at == sorted(at)
    process = started(out)
    process.join()
    assert process.exitcode == 0
    ours, theirs = (torch.load(f"{run}.end", weights_only=True) for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in out.iterdir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    assert all(not verify(path) for path in out.iterdir())


def rotate_and_die(rotation, run_dir):
    """Keep two checkpoints; die before the second file of the third is removed."""
    removed = 0

    def watch(event, arguments):
        nonlocal removed
        if event == "os.remove":
            removed += 1
            if removed == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    rotation(run_dir, 2, None)


@pytest.mark.parametrize(("rotation", "halves"), [(rotate, 0), (rotate_checkpoints, 1)])
def test_a_kill_in_a_rotation_leaves_whole_ones_alone(tmp_path, rotation, halves):
    """The control is the stock rotation, of which half a checkpoint is left in its place."""
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(name)
        write_manifest(folder)
    assert exit_code(rotate_and_die, rotation, tmp_path) == -signal.SIGKILL
    assert sum(bool(verify(folder)) for folder in tmp_path.glob("checkpoint-*")) == halves
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 + halves


def test_a_checkpoint_that_is_written_in_its_place_is_caught(tmp_path):
    """The mutation: a save in place leaves half a checkpoint behind, which has no manifest and is passed over."""
    half = tmp_path / "checkpoint-2"
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    whole = tmp_path / "checkpoint-1"
    whole.mkdir()
    (whole / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-2: manifest.json is missing, and others .* checkpoint-1: "):
        newest_good(tmp_path)
