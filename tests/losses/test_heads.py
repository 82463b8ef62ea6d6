"""On every head of the catalogue, a step is one big batch however it is split."""

import gc

import pytest
from transformers import Trainer

from tests.losses.heads import HEADS, TOLERANCE, measure
from trainer_ext import CustomTrainer

NAMED = {str(head): head for head in HEADS}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """A trainer collects garbage when it begins to train: what the session holds by now is not searched each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("loss", [None, "model"])
@pytest.mark.parametrize("name", NAMED)
def test_a_step_is_one_big_batch(trainer, name, loss):
    found = measure(NAMED[name], trainer, CustomTrainer, loss=loss)
    assert found.loss_error <= TOLERANCE
    assert found.gradient_error <= TOLERANCE


def test_the_catalogue_is_wide():
    assert len(NAMED) == len(HEADS)
    assert sum(head.task == "sequence classification" for head in HEADS) >= 24


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("sequence classification: BertForSequenceClassification", 4.0),  # added up instead of averaged
        ("token classification: EsmForTokenClassification", 1.0),  # a mean of means
    ],
)
def test_the_stock_trainer_is_off(trainer, name, factor):
    found = measure(NAMED[name], trainer, Trainer)
    assert found.loss == pytest.approx(factor, abs=0.05)
    assert found.loss_error > 100 * TOLERANCE
    assert found.gradient_error > 100 * TOLERANCE
