"""`LossSpikeWatch` on real trainings, one of whose steps has a loss that leaps."""

import logging
import math

import numpy as np
import pytest
from transformers import Trainer

from tests.conftest import logged, rows
from trainer_ext import CustomTrainer
from trainer_ext.callbacks.loss_spike_watch import LossSpikeWatch

STEPS, SPIKE = 16, 13
OPTIONS = {"max_steps": STEPS, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 10}


class Leaps(Trainer):
    """Its loss is `factor` times what it is, in one step."""

    factor = 6.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        return loss * (self.factor if self.state.global_step == SPIKE - 1 else 1.0)


def said(caplog):
    return [record.getMessage() for record in caplog.records if "LossSpikeWatch" in record.getMessage()]


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def make(trainer, watch, **options):
    return trainer(Leaps, train=rows(8), callbacks=[watch], log_level="warning", **{**OPTIONS, **options})


def test_the_step_that_leaps_is_named(trainer, heard):
    run = make(trainer, LossSpikeWatch(window=10))
    run.train()
    losses = np.array(logged(run))[: SPIKE - 1][-10:]
    spread = 1.4826 * np.median(np.abs(losses - np.median(losses)))
    limit = np.median(losses) + 10 * max(spread, 0.01 * np.median(losses))
    (warning,) = said(heard)
    assert f"the loss of steps {SPIKE} to {SPIKE} is {logged(run)[SPIKE - 1]:.6g}" in warning
    assert f"let at most {limit:.6g} be expected (their median is {np.median(losses):.6g})" in warning
    assert run.state.global_step == STEPS


def test_it_stops(trainer, heard):
    run = make(trainer, LossSpikeWatch(action="stop"))
    run.train()
    assert run.state.global_step == SPIKE
    assert len(said(heard)) == 1


def test_a_run_without_a_leap_is_quiet(trainer, heard):
    run = make(trainer, LossSpikeWatch(action="stop"))
    run.factor = 1.0
    run.train()
    assert run.state.global_step == STEPS
    assert not said(heard)


def test_a_loss_that_is_not_a_number_is_a_spike(trainer, heard):
    run = make(trainer, LossSpikeWatch(action="stop"), logging_nan_inf_filter=False)
    run.factor = math.nan
    run.train()
    assert run.state.global_step == SPIKE
    assert "is nan" in said(heard)[0]


def test_a_resumed_run_remembers(trainer, tmp_path, heard):
    """One that starts anew knows three losses at the leap, and says nothing."""
    make(trainer, LossSpikeWatch()).train()
    resumed = make(trainer, LossSpikeWatch(action="warn"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    first, second = said(heard)
    assert first == second
    heard.clear()
    anew = LossSpikeWatch()
    anew.on_train_begin = lambda *_, **__: None
    forgetful = make(trainer, anew)
    forgetful.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    assert not said(heard)


@pytest.mark.parametrize("options", [{"threshold": 0}, {"window": 7}, {"action": "skip"}, {"threshold": math.nan}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="LossSpikeWatch: threshold="):
        LossSpikeWatch(**options)


def test_it_changes_nothing(trainer):
    runs = []
    for callbacks in ([LossSpikeWatch()], []):
        runs.append(trainer(CustomTrainer, callbacks=callbacks, max_steps=10))
        runs[-1].train()
    assert logged(runs[0]) == logged(runs[1])
