"""Any batch, cut anywhere into micro-batches and dealt to any ranks, has the loss and the gradient of the whole.

The contract is held for every loss: numerators over the sum of denominators, in float64, with ignored labels, class
and sample weights, and micro-batches without a row. Cuts and flags are drawn at random, the same in every run.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_ext.losses import LOSSES, ConfiguredLoss, WeightedSum

FEATURES = 3
TOLERANCE = 1e-12
REGRESSION = ("huber", "mse")
ELEMENTS = ("asymmetric", "bce", *REGRESSION)
OPTIONS = {
    "asymmetric": [{}, {"gamma_neg": 2.0, "gamma_pos": 0.5, "clip": 0.0}],
    "bce": [{}, {"pos_weight": 3.0}],
    "cross_entropy": [{}, {"label_smoothing": 0.1}],
    "focal": [{}, {"gamma": 0.0}, {"gamma": 0.5}],
    "huber": [{}, {"delta": 0.3}],
    "ldam": [{}, {"max_margin": 1.0, "scale": 2.0}],
    "logit_adjusted": [{}, {"tau": 0.5}],
    "mse": [{}],
    "sum": [{}],
}
SUM = WeightedSum({"a": LOSSES["focal"], "b": LOSSES["logit_adjusted"]}, {"a": 0.7, "b": 0.4}, {"a": {"gamma": 1.5}})
NAMES = [*LOSSES, "sum"]


@st.composite
def steps(draw, name):
    """One optimizer step: a configured loss, the rows of all ranks, and where they are cut."""
    rows, classes = draw(st.integers(0, 12)), draw(st.integers(1 if name in ELEMENTS else 2, 4))
    inner = draw(st.sampled_from([(), (1,), (4,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if name in REGRESSION:
        labels = random(rows, *inner, classes) * 4 - 2
    elif name in ELEMENTS:
        labels = (random(rows, *inner, classes) < 0.4).double()
    else:
        labels = (random(rows, *inner) ** 2 * classes).long()
    if name not in REGRESSION:
        labels[random(*labels.shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))] = -100
    if name in ELEMENTS and classes == 1 and draw(st.booleans()):
        labels = labels.squeeze(-1)
    loss = ConfiguredLoss(
        SUM if name == "sum" else LOSSES[name],
        random(classes) * 3 if name not in REGRESSION and draw(st.booleans()) else None,
        reduction=draw(st.sampled_from(["weighted_mean", "mean"])),
        options=draw(st.sampled_from(OPTIONS[name])),
        class_counts=[float(2 * c + 1) for c in range(classes)],
    )
    weights = random(rows) * 2 if draw(st.booleans()) else None
    if weights is not None and draw(st.booleans()):
        weights[::2] = 0
    inputs = random(rows, *inner, FEATURES) * 4 - 2
    cuts = [0, *sorted(draw(st.lists(st.integers(0, rows), max_size=6))), rows]
    owners = draw(st.lists(st.integers(0, 2), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    return loss, random(FEATURES, classes) * 2 - 1, inputs, labels, weights, cuts, owners


def whole_step(loss, start, inputs, labels, weights):
    """The loss and its gradient of all rows as one batch."""
    layer = start.clone().requires_grad_()
    mean = loss(inputs @ layer, labels, weights).mean()
    return mean.item(), torch.autograd.grad(mean, layer)[0]


def split_step(loss, start, inputs, labels, weights, cuts, owners):
    """The same as a trainer does it: announce, accumulate on each rank, average the ranks' gradients."""
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    given = [(inputs[part], labels[part], None if weights is None else weights[part]) for part in parts]
    total = sum(loss.denominator(targets, own) for _, targets, own in given)
    ranks = sorted(set(owners))
    gradients, mean = {rank: torch.zeros_like(start) for rank in ranks}, 0.0
    for (rows, targets, own), rank in zip(given, owners, strict=True):
        layer = start.clone().requires_grad_()
        terms = loss(rows @ layer, targets, own)
        assert torch.equal(terms.denominator, loss.denominator(targets, own))
        scaled = terms._replace(numerator=terms.numerator * len(ranks), denominator=total).mean()
        gradients[rank] += torch.autograd.grad(scaled, layer)[0]
        mean += scaled.item() / len(ranks)
    return mean, sum(gradients.values()) / len(ranks)


def gap(found, expected):
    """The largest difference, relative to the size of what is expected; NaN where either is."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_split_has_the_loss_and_the_gradient_of_the_whole(name):
    seen = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(steps(name))
    def check(step):
        *batch, cuts, owners = step
        mean, gradient = whole_step(*batch)
        split_mean, split_gradient = split_step(*batch, cuts, owners)
        for found, expected in ((split_mean, mean), (split_gradient, gradient)):
            assert gap(found, expected) <= TOLERANCE
        seen.append((mean, float(gradient.abs().max()), len(cuts)))

    check()
    # Examples vary with what else is imported, but some have a loss and a gradient, and are cut in several parts.
    assert any(mean > 0 and gradient > 0 and parts > 3 for mean, gradient, parts in seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "mutation", ["a mean of means", "a dropped micro-batch", "ranks not averaged", "rate of 1.000001"]
)
def test_a_step_that_is_put_together_wrongly_is_caught(name, mutation):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(9, FEATURES, generator=generator, dtype=torch.float64)
    start = torch.randn(FEATURES, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (9, 3) if name in ELEMENTS else (9,), generator=generator)
    loss = ConfiguredLoss(SUM if name == "sum" else LOSSES[name], class_counts=[5.0, 3.0, 1.0])
    batch, cuts = (loss, start, inputs, labels, None), [0, 1, 4, 9]
    mean, gradient = whole_step(*batch)
    right = split_step(*batch, cuts, [0, 1, 0])
    assert gap(right[0], mean) <= TOLERANCE
    assert gap(right[1], gradient) <= TOLERANCE
    if mutation == "a mean of means":
        parts = [whole_step(loss, start, inputs[a:b], labels[a:b], None) for a, b in itertools.pairwise(cuts)]
        wrong = [sum(part[i] for part in parts) / 3 for i in range(2)]
    elif mutation == "a dropped micro-batch":
        wrong = whole_step(loss, start, inputs[1:], labels[1:], None)
    elif mutation == "ranks not averaged":
        wrong = [2 * value for value in right]
    else:
        wrong = [1.000001 * value for value in right]
    assert not gap(wrong[0], mean) <= TOLERANCE
    assert not gap(wrong[1], gradient) <= TOLERANCE
