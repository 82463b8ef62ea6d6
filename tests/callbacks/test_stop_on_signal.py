"""Real signals, to one process and to one of two ranks: a checkpoint at one step, and a resume that is the whole run."""

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.callbacks.processes import DEEPSPEED, FSDP2, run_ranks, zero
from tests.callbacks.stopped_run import STEPS, Sends, make, started, stop_and_resume, torchrun, weights
from trainer_ext import CustomTrainer
from trainer_ext.callbacks import stop_on_signal
from trainer_ext.callbacks.stop_on_signal import EXIT_CODE, SIGNALS, STOP_FILE
from trainer_ext.callbacks.time_limit import TimeLimit
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.engine import REHEARSING
from trainer_ext.rehearsal.processes import free_port

ENGINES = {
    "ddp": ({}, None, "DistributedDataParallel"),
    "zero2": (DEEPSPEED, zero(2), "DeepSpeedEngine"),
    "fsdp2": ({**FSDP2, REHEARSING: "on the CPU"}, None, "FSDPBertForSequenceClassification"),
}


def deepspeed():
    """Its launcher for the ranks of one host."""
    ranks = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    words = [f"--world_info={ranks}", f"--master_port={free_port()}", "--no_local_rank", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *words, "tests.callbacks.stopped_run"]


LAUNCHERS = {"torchrun": (torchrun, {1}), "deepspeed": (deepspeed, {0, 1, EXIT_CODE})}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class WritesStop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            (Path(args.output_dir) / STOP_FILE).write_text("")


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts these tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("whole"))
    run.train()
    return weights(run)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_signal(tmp_path, whole, number, step):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    stopped = make(tmp_path, callbacks=[Sends(number, step)], save_strategy="epoch")
    stopped.train()
    assert (stopped.stopped_by, stopped.state.global_step) == (number.name, step)
    assert f"checkpoint-{step}" in names(tmp_path)
    assert not verify(tmp_path / f"checkpoint-{step}")
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    resumed = make(tmp_path, save_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.stopped_by, resumed.state.global_step) == (None, STEPS)
    assert weights(resumed) == whole != weights(stopped)


@pytest.mark.parametrize(("strategy", "step"), [("steps", 3), ("epoch", 7)])
def test_an_evaluation_is_left_out(tmp_path, strategy, step):
    run = make(tmp_path, callbacks=[Sends(signal.SIGTERM, step)], eval_strategy=strategy)
    run.train()
    assert (run.stopped_by, names(tmp_path)) == ("SIGTERM", [f"checkpoint-{step}"])
    assert not any("eval_loss" in entry for entry in run.state.log_history)


def test_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_on_signal, "LOOKS", 0)
    run = make(tmp_path, callbacks=[WritesStop()])
    run.train()
    assert (run.stopped_by, run.state.global_step, names(tmp_path)) == (STOP_FILE, 2, ["checkpoint-2"])


def test_outside_of_the_main_thread_the_file_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_on_signal, "LOOKS", 0)
    run = make(tmp_path, callbacks=[WritesStop()])
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert (run.stopped_by, names(tmp_path)) == (STOP_FILE, ["checkpoint-2"])


def test_signals_that_are_taken_or_ignored_are_left_alone(tmp_path):
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run = make(tmp_path, callbacks=[Sends(signal.SIGUSR1, 1), Sends(signal.SIGTERM, 2)])
        run.train()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGUSR1]
    assert (run.stopped_by, run.state.global_step) == (None, STEPS)


def test_the_checkpoint_of_transformers_on_sigterm_is_its_own(tmp_path):
    """`enable_jit_checkpoint` saves some seconds after the signal; nothing of ours stands in its way."""
    kept = signal.getsignal(signal.SIGTERM)
    run = make(tmp_path, enable_jit_checkpoint=True)
    jit = signal.getsignal(signal.SIGTERM)
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    run.add_callback(Looks())
    run.train()
    assert jit != kept
    assert set(seen) == {jit}
    assert signal.getsignal(signal.SIGTERM) == kept


def test_handlers_are_back_after_an_error(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    before = {each: signal.getsignal(each) for each in SIGNALS}
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, callbacks=[Breaks()]).train()
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


class SignalledInItsSave(CustomTrainer):
    """Gets a second signal in the middle of the save that the first asked for."""

    numbers: tuple = ()
    rest = 0.0

    def _save_rng_state(self, output_dir):
        assert self._stop_on_signal._heard
        time.sleep(self.rest)
        for number in self.numbers:
            os.kill(os.getpid(), number)
        super()._save_rng_state(output_dir)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGINT,)])
def test_a_second_signal_while_it_saves(trainer, tmp_path, numbers):
    """A terminal and a launcher may both send what was one Ctrl-C."""
    run = trainer(SignalledInItsSave, callbacks=[Sends(signal.SIGINT, 2)])
    run.numbers = numbers
    run.train()
    assert run.stopped_by == "SIGINT"
    assert not verify(tmp_path / "out" / "checkpoint-2")


def test_a_second_ctrl_c_ends_at_once(trainer, tmp_path):
    trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    before = {each: signal.getsignal(each) for each in SIGNALS}
    run = trainer(SignalledInItsSave, callbacks=[Sends(signal.SIGINT, 2)])
    run.numbers, run.rest = (signal.SIGINT,), stop_on_signal.ONE_PRESS + 0.1
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert names(tmp_path / "out") == ["checkpoint-1"]
    assert not verify(tmp_path / "out" / "checkpoint-1")
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_the_checkpoint_stays_beside_the_best(tmp_path):
    """The stock end removes all but the best where `save_total_limit` is 1, and loads that."""
    run = make(
        tmp_path, callbacks=[Sends(signal.SIGTERM, 5)], save_strategy="steps", save_steps=3, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-3,
    )  # fmt: skip
    run.train()
    best = run.state.best_global_step
    assert best < 5
    assert names(tmp_path) == sorted({f"checkpoint-{best}", "checkpoint-5"})
    assert run.state.best_model_checkpoint == f"{tmp_path}/checkpoint-{best}"


@pytest.mark.parametrize(
    ("mutation", "code"), [("pass", EXIT_CODE), ("stop_on_signal._Outlives = lambda before: before", 1)]
)
def test_a_signal_to_the_workers_too(tmp_path, mutation, code):
    """As a cluster sends it, to each process of the job. Workers that die of it end the run in an error."""
    script = f"from trainer_ext.callbacks import stop_on_signal; {mutation}; from tests.callbacks import stopped_run; "
    words = [
        f"{script} stopped_run.main(dataloader_num_workers=2, dataloader_prefetch_factor=1)",
        str(tmp_path / "run"),
    ]
    process = started(tmp_path, sys.executable, "-c", *words)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == code, (tmp_path / "log").read_text()
    assert any((tmp_path / "run").glob("checkpoint-*")) == (code == EXIT_CODE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_to_one_of_two_ranks(tmp_path, engine):
    environment, config, name = ENGINES[engine]
    first, second = run_ranks(
        stop_and_resume, 2, tmp_path / "run", signal.SIGUSR1, 3, config, environment=environment, timeout=200
    )
    assert (first["heard"], second["heard"]) == (0, signal.SIGUSR1)
    for seen in (first, second):
        assert (seen["on"]["engine"], seen["on"]["world_size"]) == (name, 2)
        assert seen["on"]["stage"] == (2 if engine == "zero2" else None)
        if engine == "fsdp2":
            assert seen["on"]["placements"] == ("(Shard(dim=0),)",)
        assert seen["stopped"] == ("SIGUSR1", 4)  # it rides on the step after the third
        assert seen["saved"] == [("checkpoint-4", [])]
        assert seen["evaluated"] == [3]
        assert seen["ended"] == (None, STEPS)
        stopped, resumed, whole = seen["weights"]
        assert resumed == whole == first["weights"][2] != stopped


def test_no_rank_goes_on_before_all_are_connected(tmp_path):
    """One that ends in an error closes the group, which would be the error of those that are still connecting."""
    (connected, _), (_, went_on) = run_ranks(begun, 2, tmp_path)
    assert connected < went_on


def begun(folder):
    """On a rank, of which the first is slow to connect: when it was connected, and when it went on, on one clock."""
    connect, at = torch.distributed.new_group, {}

    def slowly(*args, **kwargs):
        group = connect(*args, **kwargs)
        if torch.distributed.get_rank() == 0:
            time.sleep(0.5)
        at["connected"] = time.monotonic()
        return group

    trainer = make(folder)
    torch.distributed.new_group = slowly
    callback = stop_on_signal.StopOnSignal()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=None)
    return at["connected"], time.monotonic()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_passes_it_on(tmp_path, launcher):
    """SIGTERM to the launcher, as a cluster's: it sends it on to its ranks, and waits 30 seconds for them to leave."""
    words, code = LAUNCHERS[launcher]
    process = started(tmp_path, *words(), str(tmp_path / "run"))
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    said = (tmp_path / "log").read_text()
    assert process.returncode in code, said
    (checkpoint,) = names(tmp_path / "run")
    assert not verify(tmp_path / "run" / checkpoint)
    assert f"SIGTERM ends the training after step {checkpoint.removeprefix('checkpoint-')} of 40" in said
    assert names(tmp_path / "run.pids") == ["0", "1"]


def test_the_command(tmp_path):
    """Its exit code, and no model or evaluation as of a run that came to its end."""
    out = tmp_path / "run"
    words = [
        "trainer-ext",
        "train",
        "--dataset",
        "sample",
        "--model",
        "tiny",
        "--output-dir",
        str(out),
        "--max-time",
        "2h",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--max-steps", "9999", "--logging-steps", "1", "--report-to", "none"], stdout=log, stderr=log
        )
    waited = time.monotonic() + 90
    while "'loss'" not in (said := (tmp_path / "log").read_text()) and time.monotonic() < waited:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_CODE, said
    (checkpoint,) = names(out)
    assert not verify(out / checkpoint)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_time_limit(tmp_path, call):
    wrong = call("train", "--dataset", "sample", "--output-dir", tmp_path / "no", "--max-time", "soon")
    assert wrong.exit_code == 2
    assert "max_time='soon' is no time" in wrong.output
    assert not (tmp_path / "no").exists()
    run = make(tmp_path / "run", max_time="61s")
    (limit,) = [callback for callback in run.callback_handler.callbacks if isinstance(callback, TimeLimit)]
    limit.margin = 60.9999  # so that no step fits in
    run.train()
    assert (run.stopped_by, names(tmp_path / "run")) == ("max_time", ["checkpoint-1"])
