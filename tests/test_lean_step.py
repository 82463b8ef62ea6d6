"""A step of `LeanStepMixin` is the stock one: the same weights and norms, the same FLOPs, modules in the mode they had."""

import importlib.util
import os

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext.lean_step import LeanStepMixin


class LeanTrainer(LeanStepMixin, Trainer):
    pass


class Modes(TrainerCallback):
    """Puts a module into evaluation mode before the third step; what each step's forwards saw."""

    def __init__(self, model):
        self.seen = []
        self.model = model
        model.bert.encoder.register_forward_pre_hook(
            lambda *_: self.seen.append([module.training for module in model.modules()])
        )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.model.dropout.eval()


def trained(cls, folder, steps=4):
    model = tiny_model()
    modes = Modes(model)
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, log_level="error", dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = cls(model, args, default_data_collator, rows(), callbacks=[modes])
    trainer.train()
    return trainer, trainer.state.total_flos, modes.seen


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return trained(Trainer, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    return trained(LeanTrainer, tmp_path_factory.mktemp("lean"))


def test_the_weights_are_the_stock_ones(stock, lean):
    for (name, expected), found in zip(stock[0].model.named_parameters(), lean[0].model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_the_flops_are_the_stock_ones(stock, lean):
    assert lean[1] == stock[1] > 0


def test_every_forward_has_every_module_in_training_mode(stock, lean):
    assert len(lean[2]) == 4
    assert all(all(step) for step in lean[2])
    assert lean[2] == stock[2]


def test_methods_are_the_models_own_again(lean):
    assert not {"train", "zero_grad"} & vars(lean[0].model).keys()


def test_no_gradient_is_left(lean):
    assert [name for name, parameter in lean[0].model.named_parameters() if parameter.grad is not None] == []


class Replaces(TrainerCallback):
    """Gives the model another head before the third step, which `SGD` trains too."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            torch.manual_seed(5)
            model.classifier = torch.nn.Linear(16, 2)
            optimizer.param_groups[0]["params"] += list(model.classifier.parameters())


class ReplacesParameter(TrainerCallback):
    """Gives the model's head another matrix before the third step, which `SGD` trains too."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            torch.manual_seed(5)
            model.classifier.weight = torch.nn.Parameter(torch.randn(2, 16))
            optimizer.param_groups[0]["params"] += [model.classifier.weight]


class Norms(LeanTrainer):
    """Keeps what the step found out, and the gradients in float64 that it found it out of."""

    def _clip_grad_norm(self, model):
        gradients = [p.grad.double().clone() for p in model.parameters() if p.grad is not None]
        found = super()._clip_grad_norm(model)
        self.pairs = [*getattr(self, "pairs", []), (gradients, self.gradient_norms, found)]
        return found


def shares(model):
    """The classifier twice, as a tied head is there twice."""
    model.again = model.classifier
    model.weight_again = model.bert.pooler.dense.weight


def widens(model):
    model.classifier.double()
    model.classifier.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    model.classifier.register_forward_hook(lambda module, args, output: output.float())


def freezes(model):
    model.bert.embeddings.requires_grad_(False)


CASES = {
    "clipped": ({"max_grad_norm": 0.05}, None, None),
    "not clipped": ({"max_grad_norm": 0.0}, None, None),
    "accumulated": ({"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}, None, None),
    "shared": ({"max_grad_norm": 0.05}, shares, None),
    "frozen": ({"max_grad_norm": 0.05}, freezes, None),
    "two dtypes": ({"max_grad_norm": 0.05}, widens, None),
    "another module in the middle": ({"max_grad_norm": 0.05, "optim": "sgd"}, None, Replaces),
    "another parameter in the middle": ({"max_grad_norm": 0.05, "optim": "sgd"}, None, ReplacesParameter),
}


def logged_norms(cls, folder, options, change, callback):
    model = tiny_model()
    if change is not None:
        change(model)
    args = TrainingArguments(
        str(folder), **{"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
        "learning_rate": 1e-2, "logging_steps": 1, **options},
    )  # fmt: skip
    callbacks = [callback()] if callback else []
    trainer = cls(model, args, default_data_collator, rows(40), callbacks=callbacks)
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return trainer, logs, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_the_norm_and_the_clipped_step_are_the_stock_ones(tmp_path, case):
    _, expected, weights = logged_norms(Trainer, tmp_path / "stock", *CASES[case])
    trainer, found, own = logged_norms(LeanTrainer, tmp_path / "lean", *CASES[case])
    assert len(found) == 4
    assert found == expected
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    assert (trainer.gradient_norms is None) == (case == "two dtypes")


@pytest.mark.parametrize("what", ["module", "parameter"])
def test_what_is_not_seen_would_show(tmp_path, monkeypatch, what):
    """The mutation: without the look at what is registered, the new head is not clipped."""
    case = CASES[f"another {what} in the middle"]
    monkeypatch.setattr(LeanTrainer, "_forget_what_is_listed", lambda self, *_: None)
    _, expected, _ = logged_norms(Trainer, tmp_path / "stock", *case)
    _, found, _ = logged_norms(LeanTrainer, tmp_path / "lean", *case)
    assert found[:2] == expected[:2]
    assert found[2:] != expected[2:]


def test_the_norms_are_those_before_clipping(tmp_path):
    """Against float64: of each parameter, and of all."""
    trainer, logs, _ = logged_norms(Norms, tmp_path, *CASES["clipped"])
    assert len(trainer.pairs) == len(logs) == 4
    for gradients, norms, total in trainer.pairs:
        expected = torch.stack([gradient.square().sum().sqrt() for gradient in gradients])
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(total.double(), expected.square().sum().sqrt(), rtol=1e-5, atol=0.0)
        assert total > 0.05


def test_a_method_that_was_replaced_is_called(tmp_path):
    model, heard = tiny_model(), []
    own = model.train

    def train(mode=True):
        heard.append(mode)
        return own(mode)

    vars(model)["train"] = train
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    LeanTrainer(model, args, default_data_collator, rows()).train()
    assert vars(model)["train"] is train
    assert heard.count(True) >= 2


def test_the_disk_is_searched_for_packages_once(tmp_path, monkeypatch):
    searched = []
    own = importlib.util.find_spec
    trainer, *_ = trained(LeanTrainer, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: searched.append(name) or own(name, *rest))
    trainer.train()
    assert searched.count("lomo_optim") <= 1


def test_the_environment_is_not_asked_about_sagemaker_in_each_step(tmp_path, monkeypatch):
    read = []
    own = os.getenv
    trainer, *_ = trained(LeanTrainer, tmp_path)
    monkeypatch.setattr(os, "getenv", lambda name, *rest: read.append(name) or own(name, *rest))
    trainer.train()
    assert read.count("SM_HP_MP_PARAMETERS") < trainer.state.global_step


def test_another_model_is_counted_anew(tmp_path):
    trainer, *_ = trained(LeanTrainer, tmp_path)
    before = trainer.floating_point_ops({"input_ids": torch.ones(2, 8)})
    trainer.model = tiny_model(num_labels=9)
    expected = Trainer.floating_point_ops(trainer, {"input_ids": torch.ones(2, 8)})
    assert before != expected == trainer.floating_point_ops({"input_ids": torch.ones(2, 8)})
