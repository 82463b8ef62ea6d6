"""What `--optim` names: transformers' own, Muon, or an import path."""

import pytest
import torch
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

from trainer_ext import CustomTrainingArguments
from trainer_ext.cli import app
from trainer_ext.optim.factory import find_optimizer, optimizer_kwargs
from trainer_ext.optim.muon import MuonWithAdamW


class Signed(torch.optim.Optimizer):
    """A user's own: each weight goes by its rate against the sign of its gradient."""

    def __init__(self, params, lr=1.0, *, scale=1.0):
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * group["scale"] * parameter.grad.sign()


def test_a_users_optimizer_by_its_import_path(trainer):
    run = trainer(
        optim="tests.optim.test_factory:Signed",
        optim_args="scale=2.0",
        learning_rate=2**-10,
        layerwise_lr_decay=0.5,
        head_lr_multiplier=8.0,
        lr_scheduler_type="constant",
        max_steps=1,
    )
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train()
    moved = {name: float((p - before[name]).detach().abs().max()) for name, p in run.model.named_parameters()}
    assert moved["classifier.weight"] == pytest.approx(8 * 2 * 2**-10, rel=1e-3)
    assert moved["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.5 * 2 * 2**-10, rel=1e-3)
    assert type(run.optimizer.optimizer) is Signed


def test_muon_by_name(trainer):
    run = trainer(optim="muon", optim_args="betas=(0.8, 0.9), muon={'momentum': 0.7}", max_steps=2)
    run.train()
    assert type(run.optimizer.optimizer) is MuonWithAdamW
    by_muon = [group for group in run.optimizer.param_groups if group["use_muon"]]
    others = [group for group in run.optimizer.param_groups if not group["use_muon"]]
    assert {group["momentum"] for group in by_muon} == {0.7}
    assert {group["betas"] for group in others} == {(0.8, 0.9)}


def test_names_of_transformers_stay_what_they_are(tmp_path):
    args = CustomTrainingArguments(str(tmp_path), optim="adafactor")
    assert args.optim is OptimizerNames.ADAFACTOR
    assert args.set_optimizer("torch.optim.NAdam", learning_rate=0.5).optim == "torch.optim.NAdam"
    assert args.learning_rate == 0.5
    assert args.set_optimizer("adamw_torch").optim is OptimizerNames.ADAMW_TORCH
    assert args.set_lr_scheduler("one_cycle", warmup_steps=3).lr_scheduler_type == "one_cycle"
    assert args.warmup_steps == 3


def test_the_arguments_that_a_class_takes():
    own = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}
    assert optimizer_kwargs(torch.optim.NAdam, "momentum_decay=0.1, eps=1e-5", **own) == {
        **own,
        "momentum_decay": 0.1,
        "eps": 1e-5,
    }
    assert optimizer_kwargs(torch.optim.SGD, None, **own) == {"lr": 0.5}
    assert find_optimizer("torch.optim:SGD") is torch.optim.SGD


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"optim": "lion9"}, "optim='lion9' is not known"),
        ({"optim": "os.path.join"}, "optim='os.path.join' is no torch.optim.Optimizer"),
        ({"optim": "nowhere.to:be_found"}, "cannot import it"),
        ({"optim": "torch.optim.SGD", "optim_args": "momentun=0.9"}, "SGD has no momentun; it takes lr, momentum"),
        ({"optim": "torch.optim.SGD", "optim_args": "0.9"}, "must read key=value"),
        ({"optim": "torch.optim.SGD", "optim_args": "momentum=open('x')"}, "must read key=value"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(tmp_path, knobs, says):
    with pytest.raises(ValueError, match="optim") as error:
        CustomTrainingArguments(str(tmp_path / "out"), **knobs)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_says_it_too(tmp_path):
    words = ["train", "--dataset", "sample", "--output-dir", str(tmp_path / "out"), "--optim", "lion9"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert "lion9" in found.output
    assert "Traceback" not in found.output
