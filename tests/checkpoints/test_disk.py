"""A disk that refuses: the checkpoint before is as it was, the new one is gone, and one message says so."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from trainer_ext import CustomTrainer
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.write import CheckpointNotSavedError

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
ROOM = 1 << 20  # bytes of a file system on which one checkpoint of the tiny model fits, and another does not


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def is_as_it_was(out, error):
    """What has to hold after a failed save of step 2."""
    assert str(error).startswith(f"{out}/checkpoint-2 was not saved: ")
    assert "What was written of it is removed" in str(error)
    assert f"{out}/checkpoint-1 is as it was" in str(error)
    assert names(out) == ["checkpoint-1"]
    assert not verify(Path(out) / "checkpoint-1")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def leave(room, ballast):
    """Fill the disk but for `room` bytes."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)


def test_a_full_disk(trainer, small_disk):
    """ENOSPC at each place of a save in turn; a tmpfs gives dozens of pages more or less than it says it has."""
    out, saved, reasons = small_disk / "out", 0, list[str]()
    trainer(**{**OPTIONS, "max_steps": 1}, output_dir=str(out)).train()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for room in range(size // 8, size, size // 8):
        leave(room, small_disk / "ballast")
        run = trainer(**{**OPTIONS, "max_steps": 2}, output_dir=str(out))
        try:
            run.train(resume_from_checkpoint=True)
        except CheckpointNotSavedError as error:
            is_as_it_was(out, error)
            reasons.append(str(error))
        else:
            saved += 1
            assert not verify(out / "checkpoint-2")
            shutil.rmtree(out / "checkpoint-2")
        (small_disk / "ballast").unlink()
    assert saved <= 4
    assert all(re.search("No space left|Errno 28|write|unexpected pos|iostream error", said) for said in reasons)
    trainer(**OPTIONS, output_dir=str(out), save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(out) == ["checkpoint-3"]


def test_out_of_file_handles(trainer):
    """EMFILE: not one more can be opened while the second checkpoint is written."""

    class NoHandle(CustomTrainer):
        def _save_checkpoint(self, model, trial):
            kept = resource.getrlimit(resource.RLIMIT_NOFILE)
            if self.state.global_step == 2:
                os.close(lowest_free := os.open(".", os.O_RDONLY))
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, kept[1]))
            try:
                super()._save_checkpoint(model, trial)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, kept)

    run = trainer(NoHandle, **OPTIONS)
    with pytest.raises(CheckpointNotSavedError, match="Too many open files"):
        run.train()
    assert "checkpoint-1" in names(run.args.output_dir)
    assert not verify(Path(run.args.output_dir) / "checkpoint-1")
    assert "checkpoint-2" not in names(run.args.output_dir)
    trainer(**OPTIONS).train(resume_from_checkpoint=True)
    assert names(run.args.output_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "scandir"])
def test_an_error_of_the_system(trainer, monkeypatch, number, call):
    """At the boundary to the system: the save's own calls of it fail, once the first checkpoint is there."""
    out = []

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    class Refused(CustomTrainer):
        def _save_checkpoint(self, model, trial):
            with monkeypatch.context() as patched:
                if self.state.global_step == 2:
                    patched.setattr(os, call, refuse)
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    out.append(self.state.global_step)

    run = trainer(Refused, **OPTIONS)
    with pytest.raises(CheckpointNotSavedError, match=os.strerror(number)):
        run.train()
    assert out == [1, 2]
    assert not verify(Path(run.args.output_dir) / "checkpoint-1")
    assert "checkpoint-2" not in names(run.args.output_dir)


def test_the_command(tmp_path):
    """One message, exit code 2, no traceback."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"
    script = f"{limit}; from trainer_ext.cli import main; main()"
    words = [
        "train",
        "--dataset",
        "sample",
        "--model",
        "tiny",
        "--output-dir",
        str(tmp_path / "run"),
        "--max-steps",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--save-steps", "1", "--report-to", "none"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"trainer-ext: error: {tmp_path}/run/checkpoint-1 was not saved: " in done.stderr
