"""A save is whole or not there: with errors of the disk, rotation, the best model, and files that callbacks add."""

import json
import os
import resource
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.conftest import logged, rows
from trainer_ext import CustomTrainer
from trainer_ext.checkpoints import durable, write
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.ranks import Ranks
from trainer_ext.checkpoints.write import SAVING, CheckpointNotSavedError, Save

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class Watch(TrainerCallback):
    """What is in the output folder after every step and after every save."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir).exists():
            self.seen.append(names(args.output_dir))

    def on_save(self, args, state, control, **kwargs):
        assert not verify(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.seen.append(names(args.output_dir))


def test_checkpoints_are_those_of_the_stock_class(trainer, tmp_path):
    trainer(**OPTIONS, output_dir=str(tmp_path / "ours")).train()
    trainer(Trainer, **OPTIONS, output_dir=str(tmp_path / "stock")).train()
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    assert names(ours) == names(stock) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    added = {"loss.json", "manifest.json", "resume.json", "saved_on.json"}
    assert set(names(ours / "checkpoint-4")) == {*names(stock / "checkpoint-4"), *added}
    assert all(not verify(ours / name) for name in names(ours))


def test_only_whole_checkpoints_are_ever_there_and_rotation_comes_last(trainer, tmp_path):
    watch = Watch()
    made = trainer(
        callbacks=[watch],
        evaluation=rows(10, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        learning_rate=0.3,
        **OPTIONS,
    )
    made.train()
    losses = logged(made, "eval_loss")
    best = 1 + min(range(4), key=losses.__getitem__)
    assert best < 4
    kept = {f"checkpoint-{best}", "checkpoint-4"}
    assert set(names(made.args.output_dir)) == kept
    assert all(name.startswith("checkpoint-") and len(seen) <= 2 for seen in watch.seen for name in seen)
    assert made.state.best_model_checkpoint == f"{made.args.output_dir}/checkpoint-{best}"
    for name in kept:
        state = json.loads((tmp_path / "out" / name / "trainer_state.json").read_text())
        so_far = 1 + min(range(state["global_step"]), key=losses.__getitem__)
        assert state["best_model_checkpoint"] == f"{made.args.output_dir}/checkpoint-{so_far}"


def test_the_one_checkpoint_that_is_kept_is_the_new_one(trainer):
    made = trainer(save_total_limit=1, **OPTIONS)
    made.train()
    assert names(made.args.output_dir) == ["checkpoint-4"]
    assert not verify(Path(made.args.output_dir) / "checkpoint-4")


def test_a_file_that_a_callback_adds_is_in_the_manifest(trainer):
    class Adds(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "mine" / "notes.txt").parent.mkdir()
            (folder / "mine" / "notes.txt").write_text("added")
            (folder / "optimizer.pt").unlink()

    made = trainer(callbacks=[Adds()], **OPTIONS)
    made.train()
    for step in (1, 4):
        folder = Path(made.args.output_dir) / f"checkpoint-{step}"
        assert not verify(folder)
        assert "mine/notes.txt" in (folder / "manifest.json").read_text()
        assert "optimizer.pt" not in (folder / "manifest.json").read_text()


def test_a_save_by_hand_is_whole(trainer):
    """As a callback of transformers does it on SIGTERM, whose marker is in a folder of the final name."""
    made = trainer(max_steps=2)
    made.train()
    place = Path(made.args.output_dir) / "checkpoint-2"
    place.mkdir(parents=True)
    (place / "checkpoint-is-incomplete.txt").write_text("under way")
    made._save_checkpoint(made.model, trial=None)
    assert not verify(place)
    assert not (place / "checkpoint-is-incomplete.txt").exists()
    assert names(place.parent) == ["checkpoint-2"]


@contextmanager
def file_size_limit(size):
    """No file can grow larger: the kernel's own EFBIG at the byte."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.mark.parametrize("size", [0, 300, 1000, 2000, 4000, 15_000, 20_000, 40_000])
def test_a_disk_that_takes_no_more(trainer, size):
    class Full(CustomTrainer):
        def _save_checkpoint(self, model, trial):
            with file_size_limit(size) if self.state.global_step == 2 else nullcontext():
                super()._save_checkpoint(model, trial)

    made = trainer(Full, **OPTIONS)
    with pytest.raises(CheckpointNotSavedError) as caught:
        made.train()
    said, out = str(caught.value), made.args.output_dir
    assert said.startswith(f"{out}/checkpoint-2 was not saved: ")
    assert "What was written of it is removed; " in said
    assert said.endswith(f" MB are free there; {out}/checkpoint-1 is as it was.")
    assert names(out) == ["checkpoint-1"]
    assert not verify(Path(out) / "checkpoint-1")
    again = trainer(**OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert names(out) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["sync_tree", "write_manifest", "sync_folder"])
def test_an_error_while_it_is_put_in_place(trainer, tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    trainer(**{**OPTIONS, "max_steps": 1}).train()
    monkeypatch.setattr(write, name, refuse)
    with pytest.raises(CheckpointNotSavedError, match=r"checkpoint-2 was not saved: \[Errno 5\] Input/output error"):
        trainer(**{**OPTIONS, "max_steps": 2, "save_steps": 2}).train()
    assert not verify(tmp_path / "out" / "checkpoint-1")
    assert SAVING not in names(tmp_path / "out")


def test_what_a_killed_save_left_is_removed_or_put_back(trainer, tmp_path):
    out = tmp_path / "out"
    half = out / SAVING / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    replaced = out / SAVING / write.REPLACED / "checkpoint-9"
    replaced.mkdir(parents=True)
    trainer(max_steps=1).train()
    assert names(out) == ["checkpoint-9"]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path):
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    (place / "of another run").write_text("old")
    save = Save(str(tmp_path), "checkpoint-1", Ranks())
    save.begin()
    (save.folder / "new").write_text("new")
    save.commit()
    assert names(place) == ["manifest.json", "new"]
    assert names(tmp_path) == ["checkpoint-1"]


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """By the order of the calls, which the kernel then keeps: files, folders, manifest, its folder, rename, parent."""
    calls, sync, rename, replace = [], os.fsync, Path.rename, os.replace

    def named(opened):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{opened}").removeprefix(f"{tmp_path}/")))
        return sync(opened)

    def renamed(path, to):
        calls.append(("rename", str(to).removeprefix(f"{tmp_path}/")))
        return rename(path, to)

    def replaced(path, to):
        calls.append(("replace", str(to).removeprefix(f"{tmp_path}/")))
        return replace(path, to)

    save = Save(str(tmp_path), "checkpoint-1", Ranks())
    save.begin()
    (save.folder / "shards").mkdir()
    (save.folder / "shards" / "a").write_text("a")
    (save.folder / "b").write_text("b")
    monkeypatch.setattr(durable.os, "fsync", named)
    monkeypatch.setattr(durable.os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    save.commit()
    at = f"{SAVING}/checkpoint-1"
    assert sorted(calls[:2]) == [("sync", f"{at}/b"), ("sync", f"{at}/shards/a")]
    assert calls[2:] == [
        ("sync", f"{at}/shards"),
        ("sync", at),
        ("sync", f"{at}/manifest.json.unfinished"),
        ("replace", f"{at}/manifest.json"),
        ("sync", at),
        ("rename", "checkpoint-1"),
        ("sync", str(tmp_path)),
    ]


def test_a_failed_save_leaves_the_state_as_it_was(trainer, monkeypatch):
    made = trainer(evaluation=rows(10), eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", **OPTIONS)
    monkeypatch.setattr(made, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(CheckpointNotSavedError, match="division by zero.*no other checkpoint is there yet"):
        made.train()
    assert made.state.best_model_checkpoint is None
    assert made._get_output_dir(trial=None) == made.args.output_dir
    assert torch.is_tensor(next(made.model.parameters()))


def test_an_upload_begins_with_the_whole_checkpoint_in_its_place(trainer, monkeypatch):
    seen = []

    def push(self, folder):
        seen.append((folder, [str(finding) for finding in verify(Path(folder))]))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    made = trainer(**OPTIONS)
    made.args.push_to_hub = True
    made.train()
    assert seen == [(f"{made.args.output_dir}/checkpoint-{step}", []) for step in (1, 2, 3, 4)]
