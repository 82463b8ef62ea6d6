"""Class weights: scikit-learn's as the oracle, and every wrong input named."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from trainer_ext import class_weights


def test_balanced_is_scikit_learns():
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    oracle = compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    np.testing.assert_allclose(class_weights("balanced", 4, labels=labels).numpy(), oracle, rtol=1e-15)


def test_ignored_labels_do_not_count():
    labels = torch.tensor([0, 0, 0, 1, -100, -100])
    assert class_weights("balanced", 2, labels=labels).tolist() == [4 / 6, 2.0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ({1: 2.5}, [1.0, 2.5]),
        ({"1": 2.5}, [1.0, 2.5]),
        ({"equivalent": 2.5, "0": 0.5}, [0.5, 2.5]),
        ([0.0, 1.0], [0.0, 1.0]),
    ],
)
def test_explicit_weights(spec, expected):
    found = class_weights(spec, 2, label2id={"different": 0, "equivalent": 1})
    assert found.tolist() == expected
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([1.0, 2.0, 3.0], r"3 weights .* 2 labels"),
        ([1.0], r"1 weights .* 2 labels"),
        ([1.0, -2.0], r"class_weights\[1\] is -2.0"),
        ([math.nan, 1.0], r"class_weights\[0\] is nan"),
        ([1.0, math.inf], r"class_weights\[1\] is inf"),
        ([0.0, 0.0], "all weights are 0"),
        ([1.0, "heavy"], "must be numbers"),
        ({"2": 1.0}, "names the label '2'; the labels are 0, 1"),
        ("balancd", "Choices: balanced"),
        ("balanced", "there are none to count"),
    ],
)
def test_wrong_weights_are_refused(spec, says):
    with pytest.raises(ValueError, match=says):
        class_weights(spec, 2)


def test_balanced_needs_every_class():
    with pytest.raises(ValueError, match=r"no sample of class \[2\]"):
        class_weights("balanced", 3, labels=torch.tensor([0, 1, 1]))
