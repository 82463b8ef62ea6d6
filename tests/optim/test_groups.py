"""Parameter groups: by type and dimension, on the architectures where names mislead."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    Trainer,
)

from tests.conftest import SIZES, tiny_model
from trainer_ext.optim.groups import assign, groups


def decayed(model):
    return {row.name for row in assign(model, weight_decay=0.1) if row.settings["weight_decay"]}


def test_bert_decays_its_matrices():
    model = tiny_model()
    assert decayed(model) == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert not any("bias" in name or "LayerNorm" in name for name in decayed(model))


def test_an_architecture_whose_name_holds_layernorm_decays_too():
    model = RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormConfig(**SIZES))
    by_name = set(Trainer.get_decay_parameter_names(None, model))
    ours = decayed(model)
    assert ours == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert len(ours - by_name) > 5  # what the name pattern leaves without decay


def test_normalisation_of_two_dimensions_does_not_decay():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 4))
    assert decayed(model) == {"1.weight"}


def test_a_tied_parameter_stands_once():
    model = BertForMaskedLM(BertConfig(**SIZES))
    names = [row.name for row in assign(model, weight_decay=0.1)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out_and_the_rest_is_whole():
    model = tiny_model()
    model.bert.embeddings.requires_grad_(False)
    rows = assign(model, weight_decay=0.1)
    assert {row.name for row in rows} == {name for name, p in model.named_parameters() if p.requires_grad}
    grouped = [p for group in groups(rows) for p in group["params"]]
    assert len(grouped) == len(rows)
    torch.optim.AdamW(groups(rows))  # refuses a parameter that is in two groups


def test_groups_do_not_depend_on_the_decay():
    """A run with decay 0 keeps its two groups, so that its optimizer state fits a run with decay."""
    found = groups(assign(tiny_model(), weight_decay=0.0))
    assert [group["weight_decay"] for group in found] == [0.0, 0.0]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        assign(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1)
