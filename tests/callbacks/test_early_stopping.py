"""`EarlyStopping` in stock trainers: where it stops by hand count, killed and resumed, and on two ranks."""

import math
import signal

import pytest
from transformers import EarlyStoppingCallback

from tests.callbacks.early_stopping_run import PATIENCE, VALUES, run_killed, run_with_own_metric, trainer_of
from tests.callbacks.processes import exit_code, run_ranks
from tests.conftest import rows
from trainer_ext.callbacks.early_stopping import EarlyStopping


def stopped_at(out, values, *callbacks, resume=None, **options):
    """The step at which training on these values of the metric ended."""
    run = trainer_of(out, values, list(callbacks), **options)
    run.train(resume_from_checkpoint=resume)
    return run.state.global_step


@pytest.mark.parametrize(
    ("values", "options", "step"),
    [
        ([3, 2, 1, 1, 1, 1, 1], {"patience": 3, "mode": "min"}, 6),
        ([3, 2, 1, 2, 0.5, 1, 1, 1, 1], {"patience": 3, "mode": "min"}, 8),
        ([1, 2, 3, 2, 1, 0, 0], {"patience": 2}, 5),  # greater is better, by its name
        ([1, 2, 3, 2, 1, 0, 0], {"patience": 2, "mode": "min"}, 3),
        ([5, 4, 3, 2, 1], {"patience": 1, "mode": "min"}, 5),  # never
        ([1.0, 0.9, 0.8, 0.7, 0.6], {"patience": 3, "mode": "min", "min_delta": 0.25}, 5),  # 0.7 is 0.3 below 1.0
        ([1.0, 0.9, 0.8, 0.7, 0.6], {"patience": 2, "mode": "min", "min_delta": 0.5}, 3),
        ([1.0, 0.75, 0.75, 0.0], {"patience": 2, "mode": "min", "min_delta": 0.25}, 3),  # by more than, not as much as
        ([math.nan, 2, math.nan, math.inf, 1, -math.inf, math.nan], {"patience": 3, "mode": "min"}, 7),
        ([math.nan, math.nan, 1], {"patience": 2, "mode": "min"}, 2),
        ([2, -math.inf, 1, 1, 1, 0], {"patience": 2, "mode": "min"}, 5),
    ],
)
def test_it_stops_where_a_hand_count_says(tmp_path, values, options, step):
    assert stopped_at(tmp_path, values, EarlyStopping("score", **options)) == step


def test_the_metric_and_its_direction_come_from_the_arguments(tmp_path):
    down = [4, 3, 2, 1, 0]
    chosen = {"metric_for_best_model": "score"}
    assert stopped_at(tmp_path, down, EarlyStopping(patience=2), **chosen) == 3
    assert stopped_at(tmp_path, down, EarlyStopping(patience=2), **chosen, greater_is_better=False) == 5
    named = EarlyStopping("eval_score", patience=2)
    assert stopped_at(tmp_path, down, named, **chosen, greater_is_better=False) == 5
    # Without any, the loss: none at all with a rate of 0.
    plain = EarlyStopping(patience=2)
    assert stopped_at(tmp_path, down, plain, learning_rate=0.0) == 3
    assert 0.5 < plain.best < 1


def test_of_several_datasets_one_decides(tmp_path):
    several = {name: rows(4) for name in ("first", "second", "third")}
    for name in several:
        stopping = EarlyStopping(f"{name}_score", 2, mode="min")
        assert stopped_at(tmp_path, VALUES, stopping, eval_dataset=several) == 5
        assert (stopping.best, stopping.best_step) == (0.3, 3)
    with pytest.raises(ValueError, match=r"no metric 'eval_loss'. It has: .*eval_first_loss.*eval_third_score"):
        stopped_at(tmp_path, VALUES, EarlyStopping(), eval_dataset=several)


def test_a_step_counts_once_and_only_in_training(tmp_path):
    stopping = EarlyStopping("score", 3, mode="min")
    run = trainer_of(tmp_path, [1, 1, 1, 1, 1, 1], [stopping], eval_steps=2, eval_on_start=True)
    run.train()
    assert run.state.global_step == 6  # 0 is the first, then 2, 4 and 6
    run.evaluate()
    assert stopping.evaluations_without_improvement == 3
    run.train()
    assert run.state.global_step == 6


def test_a_missing_metric_is_an_error_on_the_first_evaluation(tmp_path):
    run = trainer_of(tmp_path, VALUES, [EarlyStopping("accuracy")])
    with pytest.raises(ValueError, match=r"no metric 'eval_accuracy'. It has: .*eval_loss.*eval_score"):
        run.train()
    assert run.state.global_step == 1


def test_nothing_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match='eval_strategy="no" evaluates nothing'):
        stopped_at(tmp_path, VALUES, EarlyStopping(), eval_strategy="no")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": ""}, "metric='' names none"),
        ({"patience": 0}, "patience=0 must be"),
        ({"patience": 1.5}, "patience=1.5 must be"),
        ({"min_delta": -0.1}, "min_delta=-0.1 must be"),
        ({"min_delta": math.nan}, "min_delta=nan must be"),
        ({"mode": "best"}, "mode='best' must be"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        EarlyStopping(**options)


# Killed and resumed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a killed process left: its last checkpoint is at step 5."""
    out = tmp_path_factory.mktemp("killed")
    assert exit_code(run_killed, out, 7) == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == ["checkpoint-5"]
    return out / "checkpoint-5"


def test_a_killed_run_stops_where_the_whole_one_does(killed, tmp_path):
    assert stopped_at(tmp_path, VALUES, EarlyStopping("score", PATIENCE, mode="min")) == 7
    resumed = EarlyStopping("score", PATIENCE, mode="min")
    assert stopped_at(tmp_path, VALUES, resumed, resume=str(killed)) == 7
    assert (resumed.best, resumed.best_step, resumed.evaluations_without_improvement) == (0.3, 3, 4)


def test_the_stock_callback_does_not(tmp_path):
    """The mutation: its count starts anew, unless `restore_callback_states_from_checkpoint` is set."""
    options = {"metric_for_best_model": "score", "greater_is_better": False, "load_best_model_at_end": True}
    options |= {"save_strategy": "steps", "save_steps": 1}
    assert stopped_at(tmp_path, VALUES, EarlyStoppingCallback(PATIENCE), **options) == 7
    resumed = {"resume": str(tmp_path / "checkpoint-5"), **options}
    assert stopped_at(tmp_path / "again", VALUES, EarlyStoppingCallback(PATIENCE), **resumed) == 9


# Two ranks


def test_two_ranks_with_uneven_metrics_stop_together(tmp_path):
    first, second = run_ranks(run_with_own_metric, 2, tmp_path)
    for seen in (first, second):
        assert (seen["engine"], seen["world_size"]) == ("DistributedDataParallel", 2)
        assert (seen["stopped"], seen["best"]) == (7, 0.3)
    assert first["metrics"] == VALUES[:7]
    assert second["metrics"] == [1 - value for value in VALUES[:7]]
    alone = EarlyStopping("score", PATIENCE, mode="min")
    assert stopped_at(tmp_path / "alone", second["metrics"], alone) == 5  # where rank 1 would have left rank 0 waiting
