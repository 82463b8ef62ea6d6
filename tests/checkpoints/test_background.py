"""Saves that end beside the training: the files of a save that is waited for, every error heard, and nothing by halves."""

import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, default_data_collator

from tests.callbacks.processes import exit_code, run_ranks, settle_on_cpu
from tests.checkpoints.test_on_ranks import ENGINES, digest
from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback
from trainer_ext.checkpoints import write
from trainer_ext.checkpoints.manifest import read_manifest, verify
from trainer_ext.checkpoints.resume import newest_good
from trainer_ext.checkpoints.write import SAVING, CheckpointNotSavedError

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
STEPS = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
OF_THE_RUN = {"training_args.bin", "trainer_state.json", "ema.safetensors"}  # name the option, its logs, or the run
BLOCKED = "checkpoint_blocked_seconds"


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def differing(ours, theirs):
    """The names of the files that are not the same in the checkpoints of two runs, which have the same names."""
    found = set()
    for step in STEPS:
        a, b = read_manifest(Path(ours) / step), read_manifest(Path(theirs) / step)
        assert a.keys() == b.keys()
        found |= {name for name in a if a[name] != b[name]}
    return found


def at_step(step, action):
    """A callback that does something when a step ends."""

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                action(args)

    return At()


@pytest.fixture
def held(monkeypatch):
    """The thread of the first save waits until this event is set, before anything is brought to the disk."""
    go_on, sync = threading.Event(), write.sync_tree

    def hold(folder):
        assert threading.current_thread() is not threading.main_thread()
        assert go_on.wait(60)
        sync(folder)

    monkeypatch.setattr(write, "sync_tree", hold)
    return go_on


def test_the_files_are_those_of_a_save_that_is_waited_for(trainer, tmp_path, held, monkeypatch):
    """Though steps 3 and 4 are trained before the save of step 2 goes on."""
    seen = []

    def look(args):
        seen.append(names(args.output_dir))
        held.set()

    beside, waited = tmp_path / "beside", tmp_path / "waited"
    made = trainer(**OPTIONS, async_save=True, callbacks=[EMACallback(), at_step(4, look)], output_dir=str(beside))
    made.train()
    assert seen == [[SAVING]]
    monkeypatch.undo()
    trainer(**OPTIONS, callbacks=[EMACallback(), at_step(4, look)], output_dir=str(waited)).train()
    assert names(beside) == names(waited) == STEPS
    assert differing(beside, waited) == OF_THE_RUN
    for step in STEPS:
        assert not verify(beside / step)
        ours, theirs = (load_file(out / step / "ema.safetensors") for out in (beside, waited))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(logged(made, BLOCKED)) == 3
    assert all(seconds > 0 for seconds in logged(made, BLOCKED))


def test_weights_that_the_thread_would_read_are_caught(trainer, tmp_path, monkeypatch):
    """The mutation: written by the thread, they are those of a later step."""
    go_on = threading.Event()

    def late(folder):
        assert go_on.wait(60)
        made.model.save_pretrained(folder)

    monkeypatch.setattr(write, "sync_tree", late)
    callbacks = [at_step(4, lambda args: go_on.set())]
    made = trainer(**OPTIONS, async_save=True, callbacks=callbacks, output_dir=str(tmp_path / "late"))
    made.train()
    monkeypatch.undo()
    trainer(**OPTIONS, output_dir=str(tmp_path / "waited")).train()
    assert differing(tmp_path / "late", tmp_path / "waited") == {"model.safetensors"} | OF_THE_RUN - {
        "ema.safetensors"
    }


def test_rotation_the_best_model_and_a_resume(trainer, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2}
    ends = []
    for is_async in (True, False):
        out = tmp_path / str(is_async)
        options = {**OPTIONS, **best, "save_total_limit": 1, "learning_rate": 0.3, "async_save": is_async}
        made = trainer(evaluation=rows(10, seed=9), output_dir=str(out), **options)
        made.train()
        found = Path(made.state.best_model_checkpoint)
        assert found.parent == out
        assert not verify(found)
        ends.append((names(out), found.name, made.model.state_dict()))
    (ours, our_best, weights), (theirs, their_best, expected) = ends
    assert (ours, our_best) == (theirs, their_best)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("step", "kept"), [(2, []), (4, STEPS[:1]), (6, STEPS[:2])])
def test_an_error_is_heard_at_the_next_save_or_at_the_end(trainer, monkeypatch, step, kept):
    sync, trained = write.sync_tree, []

    def refuse(folder):
        if folder.name == f"checkpoint-{step}":
            raise OSError(28, "No space left on device")
        sync(folder)

    monkeypatch.setattr(write, "sync_tree", refuse)
    made = trainer(**OPTIONS, async_save=True, callbacks=[at_step(min(step + 2, 6), lambda args: trained.append(1))])
    with pytest.raises(CheckpointNotSavedError, match=f"checkpoint-{step} was not saved: .*No space left") as caught:
        made.train()
    assert ("is as it was" if kept else "no other checkpoint is there yet") in str(caught.value)
    assert trained == [1]
    assert names(made.args.output_dir) == kept


def test_an_error_of_the_training_waits_for_the_save_and_is_not_hidden(trainer, held):
    def fail(args):
        held.set()
        raise KeyError("of the training")

    made = trainer(**OPTIONS, async_save=True, callbacks=[at_step(3, fail)])
    with pytest.raises(KeyError, match="of the training"):
        made.train()
    assert names(made.args.output_dir) == STEPS[:1]
    assert not verify(Path(made.args.output_dir) / STEPS[0])


def test_a_callback_that_makes_the_folder_is_told(trainer, held):
    class Adds(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}").mkdir()
            held.set()

    with pytest.raises(CheckpointNotSavedError, match=r"checkpoint-2 was not saved: .*StatefulCallback.save_files"):
        trainer(**OPTIONS, async_save=True, callbacks=[Adds()]).train()


def train_and_die(out, count):
    """Train with saves beside the training; die when its thread opens its `count`-th file of the save of step 4."""
    settle_on_cpu()
    left = count

    def watch(event, arguments):
        nonlocal left
        if event == "open" and f"{SAVING}/checkpoint-4/" in str(arguments[0]):
            left -= threading.current_thread() is not threading.main_thread()
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    args = CustomTrainingArguments(
        output_dir=out,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        async_save=True,
        **OPTIONS,
    )
    CustomTrainer(model=tiny_model(), args=args, train_dataset=rows(), data_collator=default_data_collator).train()


@pytest.mark.parametrize("count", [1, 9, 14, 19])
def test_a_kill_in_the_thread_leaves_the_older_one(tmp_path, count):
    assert exit_code(train_and_die, str(tmp_path / "run"), count) == -signal.SIGKILL
    assert names(tmp_path / "run") == [SAVING, "checkpoint-2"]
    assert newest_good(tmp_path / "run").folder == tmp_path / "run" / "checkpoint-2"


def make(out, config, is_async, seed=0):
    args = CustomTrainingArguments(
        output_dir=out, report_to="none", disable_tqdm=True, log_level="error", deepspeed=config, use_cpu=True,
        per_device_train_batch_size=2, async_save=is_async, **OPTIONS,
    )  # fmt: skip
    model = tiny_model(seed, attn_implementation="eager")
    return CustomTrainer(model=model, args=args, train_dataset=rows(), data_collator=default_data_collator)


def saves_on_ranks(out, config):
    """The ends of a run that waits for its saves, of one that does not, and of a resume from a checkpoint of the second."""
    settle_on_cpu(config)
    from trainer_ext.engine import runs_on

    seen = {}
    for name, is_async in (("beside", True), ("waited", False)):
        made = make(f"{out}/{name}", config, is_async)
        made.train()
        seen |= {name: digest(made), "on": asdict(runs_on(made))}
    resumed = make(f"{out}/beside", config, is_async=True, seed=1)
    resumed.train(resume_from_checkpoint=f"{out}/beside/checkpoint-4")
    return seen | {"resumed": digest(resumed)}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks(tmp_path, engine):
    environment, config, file = ENGINES[engine]
    found = run_ranks(saves_on_ranks, 2, str(tmp_path), config, environment=environment, timeout=300)
    for seen in found:
        assert seen["on"]["world_size"] == 2
        assert seen["beside"] == seen["waited"] == seen["resumed"] == found[0]["waited"]
    if engine == "zero2":
        assert (found[0]["on"]["engine"], found[0]["on"]["stage"]) == ("DeepSpeedEngine", 2)
    if engine == "fsdp2":
        assert found[0]["on"]["placements"] == ("(Shard(dim=0),)",)
    assert names(tmp_path / "beside") == STEPS
    assert file in read_manifest(tmp_path / "beside" / "checkpoint-4")
    assert all(not verify(tmp_path / "beside" / step) for step in STEPS)
