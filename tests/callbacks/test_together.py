"""All callbacks in one training: none changes what it is trained to, and a resumed run is the whole one."""

import pytest
import torch

from tests.conftest import logged, rows, tiny_model
from trainer_ext import (
    EarlyStopping,
    EMACallback,
    GroupNorms,
    NonFiniteGuard,
    RunSummary,
    Throughput,
    TimeLimit,
)

OPTIONS = {
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "layerwise_lr_decay": 0.5,
    "learning_rate": 1e-2,
}


def all_of_them():
    return [
        EMACallback(decay=0.9),
        EarlyStopping(patience=10),
        NonFiniteGuard("skip"),
        TimeLimit("1h"),
        GroupNorms(),
        Throughput(),
        RunSummary(),
    ]


def train(trainer, folder, callbacks, resume=None):
    run = trainer(
        model=tiny_model(),
        evaluation=rows(13),
        callbacks=callbacks,
        output_dir=str(folder),
        logging_steps=1,
        **OPTIONS,
    )
    run.train(resume_from_checkpoint=resume)
    return run


def test_they_leave_the_training_as_it_is_and_go_on_after_a_resume(trainer, tmp_path):
    plain = train(trainer, tmp_path / "plain", [])
    whole = train(trainer, tmp_path / "whole", all_of_them())
    for quantity in ("loss", "grad_norm", "learning_rate"):
        assert logged(whole, quantity) == logged(plain, quantity)
        assert len(logged(whole, quantity)) == 6
    weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    assert any(not torch.equal(weights[name], tensor) for name, tensor in plain.model.state_dict().items())  # averages
    names = set().union(*whole.state.log_history)
    assert {"skipped_steps", "samples_per_second", "flops_utilization", "update_ratio_depth_2.decay"} <= names
    assert (tmp_path / "whole" / "run_summary.html").is_file()

    resumed = train(trainer, tmp_path / "whole", all_of_them(), resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed, "grad_norm")[-3:] == logged(whole, "grad_norm")[-3:]
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.model.state_dict().items())
    evaluated = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert resumed.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-6)
