"""Weighted cross-entropy against PyTorch's own mean reduction, split at will."""

import itertools

import pytest
import torch
from torch import nn

from trainer_ext.losses import LOSSES, ConfiguredLoss, LossTerms, find_loss

LOSS = LOSSES["cross_entropy"]
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)


def batch(shape=(12,), classes=3, dtype=torch.float64, seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, shape, generator=generator)
    if ignored:
        labels.view(-1)[::4] = -100
    return logits, labels


@pytest.mark.parametrize("shape", [(12,), (4, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_sums_over_any_split_are_pytorchs_mean(shape, smoothing, weights, parts):
    logits, labels = batch(shape)
    total = LOSS.denominator(labels, class_weights=weights)
    for logit_part, label_part in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        terms = LOSS(logit_part, label_part, class_weights=weights, label_smoothing=smoothing)
        (terms.numerator / total).backward(retain_graph=True)
    ours, logits.grad = logits.grad, None

    oracle = nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
    oracle(logits.reshape(-1, 3), labels.reshape(-1)).backward()
    assert (ours - logits.grad).abs().max() < 1e-15
    whole = LOSS(logits, labels, class_weights=weights, label_smoothing=smoothing).mean()
    assert abs(whole - oracle(logits.reshape(-1, 3), labels.reshape(-1))) < 1e-14


def test_a_mean_of_means_is_something_else():
    logits, labels = batch()
    whole = LOSS(logits, labels, class_weights=WEIGHTS).mean()
    parts = [LOSS(*part, class_weights=WEIGHTS).mean() for part in zip(logits.chunk(4), labels.chunk(4), strict=True)]
    assert abs(torch.stack(parts).mean() - whole) > 1e-2


def test_sample_weights_repeat_samples():
    logits, labels = batch((4, 3))
    counts = torch.tensor([2, 0, 1, 3])
    weighted = LOSS(logits, labels, class_weights=WEIGHTS, sample_weights=counts)
    repeated = LOSS(logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts, 0), class_weights=WEIGHTS)
    torch.testing.assert_close(weighted.numerator, repeated.numerator, rtol=1e-14, atol=0)
    torch.testing.assert_close(weighted.denominator, repeated.denominator, rtol=1e-14, atol=0)


def test_gradients_are_those_of_finite_differences():
    logits, labels = batch((6,))
    assert torch.autograd.gradcheck(lambda z: LOSS(z, labels, class_weights=WEIGHTS).mean(), (logits,))


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_the_denominator_is_announced_exactly(shape):
    for seed, weights in itertools.product(range(5), [None, WEIGHTS]):
        logits, labels = batch(shape, seed=seed)
        terms = LOSS(logits, labels, class_weights=weights)
        assert torch.equal(terms.denominator, LOSS.denominator(labels, class_weights=weights))
        assert terms.denominator.dtype == torch.float64


def test_nothing_to_learn_is_zero_and_not_nan():
    logits, _ = batch((4,))
    terms = LOSS(logits, torch.full((4,), -100), class_weights=WEIGHTS)
    loss = terms.mean()
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised(dtype):
    logits, labels = batch((8,), dtype=dtype)
    terms = LOSS(logits, labels)
    assert terms.numerator.dtype == torch.float32
    oracle = nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert abs(terms.numerator - oracle) < 1e-5


def test_reduction_mean_divides_by_the_number_of_items():
    logits, labels = batch((12,))
    loss = ConfiguredLoss(LOSS, WEIGHTS, reduction="mean")
    terms = loss(logits, labels)
    kept = labels != -100
    oracle = nn.functional.cross_entropy(logits, labels, weight=WEIGHTS, reduction="sum") / kept.sum()
    assert abs(terms.mean() - oracle) < 1e-15
    assert loss.denominator(labels) == kept.sum()


class HalfTheError:
    """A loss of a user's own."""

    def __call__(self, logits, labels, *, class_weights=None, ignore_index=-100, sample_weights=None):
        return LossTerms((logits.argmax(-1) != labels).sum() / 2, self.denominator(labels))

    def denominator(self, labels, *, class_weights=None, ignore_index=-100, sample_weights=None):
        return torch.tensor(float(len(labels)))


@pytest.mark.parametrize("separator", [":", "."])
def test_an_import_path_is_found(separator):
    assert isinstance(find_loss(f"{__name__}{separator}HalfTheError"), HalfTheError)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dise", "Choices: asymmetric, bce, cross_entropy, .*, model, or an import path"),
        ("no_such_module:loss", "cannot import it"),
        ("torch.nn.functional:no_such_loss", "cannot import it"),
        ("torch.nn.functional:cross_entropy", "has a method denominator"),
    ],
)
def test_what_is_no_loss_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        find_loss(name)
