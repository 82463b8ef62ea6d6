"""`TimeLimit` by clocks that are set by hand: where it stops, on all ranks, and what a resume goes on from."""

from time import monotonic

import pytest
from transformers import TrainerControl, TrainerState

from tests.callbacks.processes import DEEPSPEED, FSDP2, run_ranks, zero
from tests.callbacks.time_limit_run import SECONDS, STEPS, Clock, stop_and_resume, train
from trainer_ext.callbacks import time_limit
from trainer_ext.callbacks.time_limit import TimeLimit, seconds_of


@pytest.fixture(autouse=True)
def the_real_clock():
    yield
    time_limit.monotonic = monotonic


def folders(path):
    return sorted(one.name for one in path.iterdir()) if path.exists() else []


@pytest.mark.parametrize(
    ("clock", "limit", "options", "step"),
    [
        # After 8 steps 80 s are gone; the next would end at 90, and 15 more for the checkpoint are too many.
        (Clock(10), TimeLimit(100, margin=15), {}, 8),
        (Clock(10), TimeLimit(100, margin=10), {}, 9),  # 80 + 10 + 10 is just in time
        (Clock(10), TimeLimit("1m", margin=1), {}, 5),
        (Clock(10), TimeLimit(1000), {}, None),
        # An evaluation of 20 s after steps 2, 4, ..: after step 3 it is 50 s, and 10 + 20 + 15 might follow.
        (Clock(10, evaluation=20), TimeLimit(100, margin=15), {"eval_strategy": "steps", "eval_steps": 2}, 4),
        # A save of 30 s after step 3: after step 4 it is 70 s, and the last save may take as long.
        (Clock(10, save=30), TimeLimit(100, margin=15), {"save_strategy": "steps", "save_steps": 3}, 4),
    ],
)
def test_it_stops_in_time(tmp_path, clock, limit, options, step):
    run = train(tmp_path, limit, clock, **options)
    assert (limit.stopped_at, run.state.global_step) == (step, step or STEPS)
    if step:
        assert f"checkpoint-{step}" in folders(tmp_path)
        assert clock.now - clock.save - 1000 + limit.margin <= limit.max_time


def simulate(seconds, limit, steps, monkeypatch):
    """The step of the stop and the number of talks between ranks, where step n takes `seconds(n)`."""
    now, talks = [0.0], []
    monkeypatch.setattr(time_limit, "monotonic", lambda: now[0])
    monkeypatch.setattr(time_limit, "of_first_rank", lambda values, device: talks.append(1) or values)
    state, control = TrainerState(max_steps=steps), TrainerControl()
    args = type("Arguments", (), {"device": None, "save_strategy": "no"})
    limit.on_train_begin(args, state, control)
    while not control.should_training_stop and state.global_step < steps:
        limit.on_step_begin(args, state, control)
        state.global_step += 1
        now[0] += seconds(state.global_step)
        limit.on_step_end(args, state, control)
    return state.global_step, len(talks), now[0]


def test_ranks_talk_about_once_a_minute(monkeypatch):
    stopped, talks, now = simulate(lambda n: 0.25, TimeLimit("1h"), 100_000, monkeypatch)
    assert stopped == 4 * (3600 - 60)  # the last step that leaves a minute ends then
    assert now == 3600 - 60
    assert talks < 90


def test_steps_that_become_slower_end_in_time(monkeypatch):
    for factor in (1.5, 2.0):
        *_, now = simulate(lambda n, f=factor: 1.0 if n < 1000 else f, TimeLimit("30m"), 100_000, monkeypatch)
        assert 1740 - 2 * factor <= now <= 1740


def test_a_slow_first_step_is_forgotten(monkeypatch):
    stopped, *_ = simulate(lambda n: 600.0 if n == 1 else 1.0, TimeLimit("1h"), 100_000, monkeypatch)
    assert stopped == 3600 - 60 - 600 + 1


def test_a_broken_off_epoch_is_not_evaluated(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}
    limit = TimeLimit(100, margin=15)
    run = train(tmp_path, limit, Clock(10), **options)  # 16 steps an epoch
    assert limit.stopped_at == 8
    assert folders(tmp_path) == ["checkpoint-8"]
    assert not [entry for entry in run.state.log_history if "eval_loss" in entry]
    limit = TimeLimit(200, margin=35)
    run = train(tmp_path / "whole", limit, Clock(10), **options)
    assert limit.stopped_at == 16  # with the epoch, which is evaluated
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 1


def test_the_checkpoint_is_saved_where_only_the_best_are(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "metric_for_best_model": "loss"}
    train(tmp_path, TimeLimit(100, margin=15), Clock(10), **options, greater_is_better=True)
    assert "checkpoint-8" in folders(tmp_path)


@pytest.mark.parametrize(
    ("engine", "environment", "deepspeed"),
    [
        ("DistributedDataParallel", None, None),
        ("FSDPBertForSequenceClassification", FSDP2, None),
        ("DeepSpeedEngine", DEEPSPEED, zero(3)),
    ],
)
def test_two_ranks_with_different_clocks(tmp_path, engine, environment, deepspeed):
    ranks = run_ranks(stop_and_resume, 2, tmp_path, deepspeed, environment=environment)
    for found in ranks:
        assert (found["engine"], found["world_size"]) == (engine, 2)
        assert found["stopped"] == (8, 8)
        assert found["steps"] == (STEPS, STEPS)
        stopped, resumed, whole = found["weights"]
        assert resumed == whole
        assert stopped != whole


def test_rank_1_alone_would_not_have_stopped(tmp_path):
    limit = TimeLimit(100, margin=15)
    assert train(tmp_path, limit, Clock(SECONDS[1])).state.global_step == STEPS
    assert limit.stopped_at is None


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("1:30:00", 5400),
        ("00:00:45", 45),
        ("90m", 5400),
        ("2h30m", 9000),
        ("1d12h", 129_600),
        ("45s", 45),
        ("1h1s", 3601),
    ],
)
def test_times(time, seconds):
    assert seconds_of("max_time", time) == seconds


@pytest.mark.parametrize(
    "time", ["", "90", "1:30", "1:60:00", "2h30", "30m2h", "1.5h", "-1h", 0, -5, float("nan"), "0m"]
)
def test_what_is_no_time(time):
    with pytest.raises(ValueError, match=r"max_time=.* (is no time|must be a time above 0)"):
        TimeLimit(time)


def test_no_time_to_train():
    with pytest.raises(ValueError, match="max_time='30s' leaves no time to train, with margin='1m'"):
        TimeLimit("30s")
