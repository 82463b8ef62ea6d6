"""A step of `LeanStepMixin` is the stock one: the same weights, the same FLOPs, and modules in the mode they had."""

import importlib.util

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


def test_train_is_the_models_own_again(lean):
    assert "train" not in vars(lean[0].model)


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


def test_another_model_is_counted_anew(tmp_path):
    trainer, *_ = trained(LeanTrainer, tmp_path)
    before = trainer.floating_point_ops({"input_ids": torch.ones(2, 8)})
    trainer.model = tiny_model(num_labels=9)
    expected = Trainer.floating_point_ops(trainer, {"input_ids": torch.ones(2, 8)})
    assert before != expected == trainer.floating_point_ops({"input_ids": torch.ones(2, 8)})
