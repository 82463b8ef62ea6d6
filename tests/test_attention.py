"""`attn_implementation`: what the model computes with, and what is refused."""

import pytest
import torch
from torch import nn

from tests.conftest import tiny_model
from trainer_ext.attention import set_attention


def implementation(model):
    return model.config._attn_implementation


@pytest.mark.parametrize(
    ("asked", "dropout", "on_cpu", "found"),
    [
        ("eager", 0.0, True, "eager"),
        ("sdpa", 0.1, True, "sdpa"),
        ("auto", 0.1, True, "eager"),
        ("auto", 0.0, True, "sdpa"),
        ("auto", 0.1, False, "sdpa"),
    ],
)
def test_the_model_has_it(asked, dropout, on_cpu, found):
    model = tiny_model(dropout=dropout)
    assert implementation(model) == "sdpa"
    set_attention(model, asked, on_cpu=on_cpu)
    assert implementation(model) == found


def test_the_trainer_sets_it_also_on_a_fresh_model(trainer):
    assert implementation(trainer().model) == "sdpa"
    assert implementation(trainer(attn_implementation="auto").model) == "eager"
    made = trainer(model=None, model_init=lambda: tiny_model(), attn_implementation="eager")
    assert implementation(made.call_model_init()) == "eager"


def test_eager_attention_is_what_is_computed(trainer, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    trainer(attn_implementation="auto", max_steps=1).train()
    with pytest.raises(TypeError):
        trainer(max_steps=1).train()


def test_a_name_that_is_not_there(trainer):
    with pytest.raises(ValueError, match="attn_implementation='quick'"):
        trainer(attn_implementation="quick")


def test_a_model_without_a_choice():
    set_attention(nn.Linear(2, 2), "auto", on_cpu=True)
    with pytest.raises(ValueError, match="attn_implementation='eager': Linear is no model of transformers"):
        set_attention(nn.Linear(2, 2), "eager", on_cpu=True)
