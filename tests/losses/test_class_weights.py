"""Class weights: scikit-learn's as the oracle, and every wrong input named."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from trainer_ext import class_weights
from trainer_ext.losses.class_weights import FROM_COUNTS, effective_number


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


COUNTS = [900.0, 90.0, 10.0]
NAMED = list(FROM_COUNTS)


def labels_of_counts(counts):
    return torch.cat([torch.full((int(n),), c) for c, n in enumerate(counts)])


def test_the_effective_number_is_the_papers():
    """Equation 2 of Cui et al. 2019, `E_n = 1 + beta E_(n-1)` summed as it stands; section 4.1 scales to the sum C."""
    for beta in (0.0, 0.5, 0.9, 0.999, 0.9999):
        effective = []
        for n in COUNTS:
            number = 0.0
            for _ in range(int(n)):
                number = 1 + beta * number
            effective.append(number)
        scale = 3 / sum(1 / e for e in effective)
        expected = [scale / e for e in effective]
        np.testing.assert_allclose(effective_number(torch.tensor(COUNTS), beta).numpy(), expected, rtol=1e-12)


def test_the_default_beta_is_the_papers_0_999():
    found = class_weights("effective_number", 3, class_counts=COUNTS)
    assert torch.equal(found, effective_number(torch.tensor(COUNTS), 0.999))
    assert not torch.equal(found, effective_number(torch.tensor(COUNTS), 0.99))


def test_beta_runs_from_no_weights_to_inverse_counts():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    assert torch.equal(effective_number(counts, 0.0), torch.ones(3, dtype=torch.float64))
    inverse = (1 / counts) * (3 / (1 / counts).sum())
    np.testing.assert_allclose(effective_number(counts, 1 - 1e-12).numpy(), inverse.numpy(), rtol=1e-8)
    spread = [float(w.max() / w.min()) for w in (effective_number(counts, b) for b in (0.0, 0.9, 0.99, 0.999, 0.9999))]
    assert spread == sorted(spread)


def test_the_effective_number_of_many_samples_is_one_over_one_minus_beta():
    found = class_weights("effective_number", 2, class_counts=[1e12, 10.0])
    assert math.isclose(found[1] / found[0], 1 / (1 - 0.999**10), rel_tol=1e-12)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
def test_a_wrong_beta_is_named(beta):
    with pytest.raises(ValueError, match=f"beta={beta}"):
        effective_number(torch.tensor(COUNTS), beta)


def test_inverse_sqrt_is_one_over_the_root():
    found = class_weights("inverse_sqrt", 3, class_counts=COUNTS).tolist()
    raw = [n**-0.5 for n in COUNTS]
    np.testing.assert_allclose(found, [3 * r / sum(raw) for r in raw], rtol=1e-14)
    balanced = class_weights("balanced", 3, class_counts=COUNTS)
    assert math.isclose(found[2] / found[0], math.sqrt(balanced[2] / balanced[0]), rel_tol=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_labels_and_their_counts_give_the_same(name):
    labels = torch.cat([labels_of_counts(COUNTS), torch.full((17,), -100)]).reshape(-1, 9)
    from_labels = class_weights(name, 3, labels=labels)
    from_counts = class_weights(name, 3, class_counts=COUNTS)
    assert from_labels.dtype == from_counts.dtype == torch.float64
    assert torch.equal(from_labels, from_counts)
    assert torch.equal(from_labels, class_weights(name, 3, class_counts=torch.tensor([900, 90, 10])))
    assert from_labels.tolist() == sorted(from_labels.tolist())  # the rarer, the heavier


@pytest.mark.parametrize("name", NAMED)
def test_equal_counts_give_ones(name):
    assert torch.allclose(class_weights(name, 4, class_counts=[25] * 4), torch.ones(4).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["balanced", "inverse_sqrt"])
def test_fractions_of_the_data_do_as_well_as_counts(name):
    fractions = [n / sum(COUNTS) for n in COUNTS]
    found, expected = (class_weights(name, 3, class_counts=given) for given in (fractions, COUNTS))
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)


def test_the_effective_number_of_fractions_is_refused():
    with pytest.raises(ValueError, match=r"needs counts from 1, and was given \[0.9, 0.09, 0.01\]"):
        class_weights("effective_number", 3, class_counts=[0.9, 0.09, 0.01])


def test_the_mean_weight_of_a_balanced_sample_is_one():
    labels = labels_of_counts(COUNTS)
    weights = class_weights("balanced", 3, labels=labels)
    assert abs(weights[labels].mean() - 1) < 1e-12
    for name in ("effective_number", "inverse_sqrt"):
        assert abs(class_weights(name, 3, labels=labels).sum() - 3) < 1e-12


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"labels": torch.tensor([0, 1, 1])}, r"class_weights='{name}': .* no sample of class \[2\]"),
        ({"labels": torch.tensor([2, -100])}, r"no sample of class \[0, 1\]"),
        ({"labels": torch.tensor([], dtype=torch.int64)}, r"no sample of class \[0, 1, 2\]"),
        ({"class_counts": [3, 0, 1]}, r"no sample of class \[1\]"),
        ({"class_counts": [3, 1]}, r"class_counts=\[3.0, 1.0\]: give one number from 0 for each of 3"),
        ({"class_counts": [3, 1, -1]}, r"class_counts=\[3.0, 1.0, -1.0\]"),
        ({"class_counts": [3, 1, math.inf]}, r"class_counts=\[3.0, 1.0, inf\]"),
        ({"class_counts": [3, 1, math.nan]}, r"class_counts=\[3.0, 1.0, nan\]"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"counts labels that are integers in 0..2, or -100"),
        ({}, "class_weights='{name}' counts the training labels, and there are none"),
    ],
)
def test_what_cannot_be_counted_is_refused(name, given, says):
    with pytest.raises(ValueError, match=says.replace("{name}", name)):
        class_weights(name, 3, **given)
