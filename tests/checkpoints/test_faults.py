"""Faults in every file of a checkpoint: none is loaded, and the run that goes on is the run that would have been.

Six steps with a shuffled order and dropout, checkpoints after 2 and 4. The fault is in the newer one.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import logged, rows, tiny_model
from trainer_ext.callbacks.ema import EMACallback
from trainer_ext.checkpoints import resume
from trainer_ext.checkpoints.manifest import verify

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2}


def missing(path, older):
    path.unlink()


def truncated(path, older):
    os.truncate(path, path.stat().st_size // 2)


def zeroed_tail(path, older):
    content = path.read_bytes()
    keep = len(content) // 2
    path.write_bytes(content[:keep] + bytes(len(content) - keep))


def bit_flipped(path, older):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def swapped(path, older):
    path.write_bytes(older.read_bytes())


FAULTS = [missing, truncated, zeroed_tail, bit_flipped, swapped]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run's folder, trained once; its checkpoints are copied for each fault."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def train(trainer, tmp_path, whole):
    def run(folder, resume_from=None, **options):
        made = trainer(
            model=tiny_model(seed=0 if resume_from is None else 1),
            callbacks=[EMACallback()],
            output_dir=str(folder),
            **SAVING,
            **options,
        )
        made.train(resume_from_checkpoint=resume_from)
        return made

    if not (whole / "run").exists():
        made = run(whole / "run")
        torch.save((made.model.state_dict(), logged(made)), whole / "end.pt")
    return run


@pytest.fixture
def copy(train, tmp_path, whole):
    """A run's folder as it was when it was killed after step 4."""
    for step in (2, 4):
        shutil.copytree(whole / "run" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def same_end(made, whole):
    weights, losses = torch.load(whole / "end.pt", weights_only=True)
    found = made.model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights) and (
        logged(made) == losses
    )  # fmt: skip


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_every_fault_in_every_file_is_found(copy):
    """And the older checkpoint is chosen. What is the same in both checkpoints cannot be swapped."""
    newer, older = copy / "checkpoint-4", copy / "checkpoint-2"
    names = files(newer)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "loss.json",
            "config.json", "training_args.bin", "ema.safetensors", "resume.json", "saved_on.json",
            "manifest.json"} == set(map(str, names))  # fmt: skip
    tried = found = 0
    for name in names:
        content = (newer / name).read_bytes()
        for fault in FAULTS:
            fault(newer / name, older / name)
            if (newer / name).exists() and (newer / name).read_bytes() == content:
                assert fault is swapped
                assert str(name) in ("config.json", "loss.json", "training_args.bin")
                continue
            tried += 1
            choice = resume.newest_good(copy)
            found += choice.folder == older and [*choice.passed_over] == [newer]
            (wrong,) = choice.passed_over[newer] if str(name) != "manifest.json" else [str(name)]
            assert wrong.startswith(str(name)), wrong
            with pytest.raises(ValueError, match="checkpoint-4 is not as it was saved"):
                resume.named(newer)
            (newer / name).write_bytes(content)
            assert resume.newest_good(copy) == resume.Choice(newer)
    assert (tried, found) == (12 * 5 - 3,) * 2


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("model.safetensors", bit_flipped),
        ("optimizer.pt", zeroed_tail),
        ("trainer_state.json", swapped),
        ("rng_state.pth", swapped),
        ("scheduler.pt", missing),
        ("ema.safetensors", truncated),
        ("manifest.json", missing),
    ],
)
def test_the_run_falls_back_and_ends_as_it_would_have(train, copy, whole, name, fault):
    fault(copy / "checkpoint-4" / name, copy / "checkpoint-2" / name)
    harmed = files(copy / "checkpoint-4")
    made = train(copy, resume_from=True)
    assert same_end(made, whole)
    assert sorted(path.name for path in copy.iterdir()) == [
        "_bad-checkpoint-4", "checkpoint-2", "checkpoint-4", "checkpoint-6"
    ]  # fmt: skip
    assert files(copy / "_bad-checkpoint-4") == harmed
    assert all(not verify(copy / f"checkpoint-{step}") for step in (2, 4, 6))
    ours = load_file(copy / "checkpoint-6" / "ema.safetensors")
    theirs = load_file(whole / "run" / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_finished_run_trains_no_further(train, copy, whole):
    """Its last step is not the last of an epoch, where the stock class goes on with the next batch."""
    shutil.copytree(whole / "run" / "checkpoint-6", copy / "checkpoint-6")
    made = train(copy, resume_from=True)
    assert made.state.global_step == 6
    assert same_end(made, whole)
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_named_one_is_refused_before_anything_is_loaded(train, copy, caplog):
    bit_flipped(copy / "checkpoint-4" / "model.safetensors", None)
    with pytest.raises(ValueError, match="model.safetensors is not as it was saved: its SHA-256 differs.*--accept"):
        train(copy, resume_from=str(copy / "checkpoint-4"))
    (copy / "checkpoint-4" / "optimizer.pt").write_bytes(b"no pickle is loaded")
    (copy / "checkpoint-2" / "extra.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"(?s)No checkpoint in .* checkpoint-4: .* checkpoint-2: extra.bin is not in"
    ):
        train(copy, resume_from=True)
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_what_was_passed_over_is_said(train, copy, whole, caplog):
    truncated(copy / "checkpoint-4" / "optimizer.pt", None)
    notes = resume.newest_good(copy).notes()
    assert len(notes) == 1
    assert notes[0].startswith(f"{copy}/checkpoint-4 is passed over: optimizer.pt has ")


def test_without_a_manifest_only_where_no_sibling_has_one(train, copy, whole):
    (copy / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 is not as it was saved: manifest.json is missing, and others"):
        train(copy, resume_from=str(copy / "checkpoint-2"))
    (copy / "checkpoint-4" / "manifest.json").unlink()
    for choice in (resume.newest_good(copy), resume.named(copy / "checkpoint-4")):
        assert choice == resume.Choice(copy / "checkpoint-4", verified=False)
        assert "it is not verified" in choice.notes()[0]
    assert same_end(train(copy, resume_from=True), whole)
    assert not verify(copy / "checkpoint-6")


def test_a_resume_that_does_not_look_is_caught(train, copy, whole, monkeypatch):
    """The mutation: without the check the run goes on from rotten weights, and no error tells."""
    monkeypatch.setattr(resume, "verify", lambda folder: [])
    bit_flipped(copy / "checkpoint-4" / "model.safetensors", None)
    assert not same_end(train(copy, resume_from=True), whole)


def test_a_rotten_best_checkpoint_is_not_loaded(trainer):
    class Rots(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "train_runtime" in logs:
                bit_flipped(Path(state.best_model_checkpoint) / "model.safetensors", None)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2}
    made = trainer(evaluation=rows(10), callbacks=[Rots()], **best, **SAVING)
    with pytest.raises(ValueError, match=r"checkpoint-\d is not as it was saved: model.safetensors"):
        made.train()
