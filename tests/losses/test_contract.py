"""The contract's own machinery: losses of a user's own held to it, losses with their settings bound, and sums of losses."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from trainer_ext.losses import LOSSES, ConfiguredLoss, LossTerms, WeightedSum
from trainer_ext.losses.contract import check_loss, check_terms, divide

WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
SAMPLES = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 1.0, 0.25], dtype=torch.float64)
COUNTS = [50.0, 7.0, 2.0]


def batch(rows=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    labels[1::4] = -100
    return logits, labels


class Hinge:
    """A loss of a user's own, which is right; subclasses break one promise each."""

    def __call__(self, logits, labels, *, class_weights=None, ignore_index=-100, sample_weights=None):
        weights = self.items(labels, class_weights, ignore_index, sample_weights)
        right = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1))
        return LossTerms((weights * ((logits - right + 1).relu().sum(-1) - 1)).sum(), weights.sum())

    def denominator(self, labels, *, class_weights=None, ignore_index=-100, sample_weights=None):
        return self.items(labels, class_weights, ignore_index, sample_weights).sum()

    @staticmethod
    def items(labels, class_weights, ignore_index, sample_weights):
        weights = (labels != ignore_index).double()
        for own in (None if class_weights is None else class_weights[labels.clamp(min=0)], sample_weights):
            weights = weights if own is None else weights * own
        return weights


class MeanHinge(Hinge):
    def __call__(self, logits, labels, **given):
        return LossTerms(super().__call__(logits, labels, **given).mean(), self.denominator(labels, **given))


class MeanDividedByTheSum(Hinge):
    """Numerator as it should be; a denominator that is a mean, announced as such."""

    def __call__(self, logits, labels, **given):
        return LossTerms(super().__call__(logits, labels, **given).numerator, self.denominator(labels, **given))

    def denominator(self, labels, **given):
        return super().denominator(labels, **given) / max(1, len(labels))


class ForgetsIgnored(Hinge):
    def denominator(self, labels, **given):
        return torch.tensor(float(len(labels)))


class ForgetsTheWeights(Hinge):
    def denominator(self, labels, *, class_weights=None, **given):
        return super().denominator(labels, **given)


class ForgetsTheSamples(Hinge):
    def denominator(self, labels, *, sample_weights=None, **given):
        return super().denominator(labels, **given)


class OnlyALoss(Hinge):
    def __call__(self, logits, labels, **given):
        return super().__call__(logits, labels, **given).mean()


class Vector(Hinge):
    def __call__(self, logits, labels, **given):
        terms = super().__call__(logits, labels, **given)
        return LossTerms(terms.numerator.expand(2), terms.denominator)


class PlainNumbers(Hinge):
    def __call__(self, logits, labels, **given):
        return LossTerms(*(term.item() for term in super().__call__(logits, labels, **given)))


class ThreeTerms(Hinge):
    def __call__(self, logits, labels, **given):
        return (*super().__call__(logits, labels, **given), torch.tensor(0.0))


class NotANumber(Hinge):
    def __call__(self, logits, labels, **given):
        terms = super().__call__(logits, labels, **given)
        return LossTerms(terms.numerator * math.nan, terms.denominator)


class NotANumberOfItems(Hinge):
    def denominator(self, labels, **given):
        return super().denominator(labels, **given) * math.nan


class OfTheWholeBatch(Hinge):
    """Contrastive in kind: what an item costs depends on the others."""

    def __call__(self, logits, labels, **given):
        return super().__call__(logits - logits.mean(0), labels, **given)


# check_terms


def said_of(loss, *given):
    """What `check_terms` says; None of a loss that keeps the contract."""
    try:
        return check_terms(loss, *given)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("sample_weights", [None, SAMPLES])
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
def test_a_loss_that_keeps_the_contract_passes(class_weights, sample_weights, reduction):
    logits, labels = batch()
    for loss in (Hinge(), *(LOSSES[name] for name in ("cross_entropy", "focal", "ldam", "logit_adjusted"))):
        configured = ConfiguredLoss(loss, class_weights, reduction, class_counts=COUNTS)
        assert said_of(configured, logits, labels, sample_weights) is None
    targets = torch.rand(7, 3, generator=torch.Generator().manual_seed(1))
    for name in ("asymmetric", "bce", "huber", "mse"):
        own = None if name in ("huber", "mse") else class_weights
        assert said_of(ConfiguredLoss(LOSSES[name], own, reduction), logits, targets, sample_weights) is None


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_on_few_rows_and_in_low_precision(rows, dtype):
    logits, labels = batch(rows)
    for name in ("cross_entropy", "focal", "ldam", "logit_adjusted"):
        assert said_of(ConfiguredLoss(LOSSES[name], WEIGHTS, class_counts=COUNTS), logits.to(dtype), labels) is None
    assert "NotANumber" in said_of(ConfiguredLoss(NotANumber()), logits.to(dtype), labels)


def test_it_passes_where_every_label_is_ignored():
    logits, labels = batch()
    ignored = torch.full_like(labels, -100)
    assert said_of(ConfiguredLoss(LOSSES["focal"], WEIGHTS), logits, ignored) is None
    assert "ForgetsIgnored" in said_of(ConfiguredLoss(ForgetsIgnored()), logits, ignored)


def test_it_builds_no_graph():
    logits, labels = batch()
    seen = []

    class Watched(Hinge):
        def __call__(self, logits, labels, **given):
            terms = super().__call__(logits, labels, **given)
            seen.append(terms.numerator.requires_grad)
            return terms

    check_terms(ConfiguredLoss(Watched()), logits, labels)
    assert seen == [False] * 3


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (
            MeanHinge,
            "MeanHinge has no numerator that adds up over rows: 7 rows have .*, the first 2 .* without a mean",
        ),
        (MeanDividedByTheSum, "MeanDividedByTheSum has no denominator that adds up over rows"),
        (OfTheWholeBatch, "OfTheWholeBatch has no numerator that adds up over rows"),
        (NotANumber, "NotANumber has no numerator that adds up over rows: 7 rows have nan"),
        (
            ForgetsIgnored,
            r"ForgetsIgnored came with the denominator .*, and its denominator\(\) says 7 for the same labels",
        ),
        (ForgetsTheWeights, r"ForgetsTheWeights came with the denominator"),
        (ForgetsTheSamples, r"ForgetsTheSamples came with the denominator"),
        (NotANumberOfItems, r"its denominator\(\) says nan"),
        (OnlyALoss, r"OnlyALoss returned Tensor; it has to return LossTerms\(numerator, denominator\)"),
        (Vector, "Vector returned LossTerms; .* two scalar tensors"),
        (PlainNumbers, "PlainNumbers returned LossTerms; .* two scalar tensors"),
        (ThreeTerms, "ThreeTerms returned tuple; .* two scalar tensors"),
    ],
)
def test_a_broken_promise_is_named(loss, says):
    logits, labels = batch()
    with pytest.raises(ValueError, match=says):
        check_terms(ConfiguredLoss(loss(), WEIGHTS), logits, labels, SAMPLES)


def test_a_function_is_named_by_its_name():
    def average(logits, labels, **given):
        return LossTerms(logits.mean(), average.denominator(labels))

    average.denominator = lambda labels, **given: torch.tensor(float(len(labels)))
    logits, labels = batch()
    with pytest.raises(ValueError, match="average has no numerator"):
        check_terms(ConfiguredLoss(check_loss(average, "average")), logits, labels)


@pytest.mark.parametrize("wrong", [nn.CrossEntropyLoss(), 3, None, lambda logits, labels: None])
def test_what_offers_no_denominator_is_no_loss(wrong):
    with pytest.raises(ValueError, match=r"loss 'mine' is not usable: .* has a method denominator"):
        check_loss(wrong, "mine")


# ConfiguredLoss


def test_settings_are_bound():
    logits, labels = batch()
    bound = ConfiguredLoss(LOSSES["ldam"], WEIGHTS, options={"max_margin": 0.9}, class_counts=COUNTS)
    found = bound(logits, labels, SAMPLES)
    given = {"class_weights": WEIGHTS, "sample_weights": SAMPLES}
    plain = LOSSES["ldam"](logits, labels, class_counts=COUNTS, max_margin=0.9, **given)
    assert torch.equal(found.numerator, plain.numerator)
    assert torch.equal(found.denominator, plain.denominator)
    assert torch.equal(bound.denominator(labels, SAMPLES), found.denominator)
    with pytest.raises(FrozenInstanceError):
        bound.reduction = "mean"


def test_counts_go_only_to_a_loss_that_asks_for_them():
    logits, labels = batch()
    ConfiguredLoss(LOSSES["cross_entropy"], class_counts=COUNTS)(logits, labels)
    with pytest.raises(ValueError, match="needs class_counts"):
        ConfiguredLoss(LOSSES["ldam"])(logits, labels)


def test_an_unknown_option_is_not_swallowed():
    logits, labels = batch()
    for name in LOSSES:
        targets = labels if name in ("cross_entropy", "focal", "ldam", "logit_adjusted") else torch.zeros(7, 3)
        with pytest.raises(TypeError, match="gama"):
            ConfiguredLoss(LOSSES[name], options={"gama": 2.0}, class_counts=COUNTS)(logits, targets)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "ldam", "logit_adjusted"])
@pytest.mark.parametrize("sample_weights", [None, SAMPLES])
def test_reduction_mean_divides_by_items_and_leaves_the_numerator(name, sample_weights):
    logits, labels = batch()
    mean, weighted = (
        ConfiguredLoss(LOSSES[name], WEIGHTS, reduction, class_counts=COUNTS)
        for reduction in ("mean", "weighted_mean")
    )
    found, other = (loss(logits, labels, sample_weights) for loss in (mean, weighted))
    items = (labels != -100).double()
    assert torch.equal(found.numerator, other.numerator)
    assert found.denominator == (items if sample_weights is None else items * sample_weights).sum()
    assert found.denominator != other.denominator
    assert torch.equal(found.denominator, mean.denominator(labels, sample_weights))


@pytest.mark.parametrize(
    ("after", "progress", "weighted"),
    [
        (0.0, 0.0, True),
        (0.0, 1.0, True),
        (0.8, 0.0, False),
        (0.8, 0.799, False),
        (0.8, 0.8, True),
        (1.0, 0.999, False),
    ],
)
def test_class_weights_may_wait(after, progress, weighted):
    logits, labels = batch()
    loss = ConfiguredLoss(LOSSES["ldam"], WEIGHTS, class_counts=COUNTS, reweight_after=after)
    now = loss.at(progress)
    plain = LOSSES["ldam"](logits, labels, class_counts=COUNTS, class_weights=WEIGHTS if weighted else None)
    terms = now(logits, labels)
    assert torch.equal(terms.numerator, plain.numerator)
    assert torch.equal(terms.denominator, plain.denominator)
    assert torch.equal(now.denominator(labels), plain.denominator)
    assert loss.class_weights is WEIGHTS  # what evaluation uses


# LossTerms


def test_a_mean_of_nothing_is_zero_with_a_gradient():
    numerator = torch.tensor(math.nan, requires_grad=True)
    loss = divide(numerator, torch.tensor(0.0, dtype=torch.float64))
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, numerator)[0] == 0


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_terms_of_nothing_are_zero_and_joined_to_the_graph(value):
    numerator = torch.tensor(value, requires_grad=True)
    nothing = LossTerms(numerator, torch.tensor(5.0)).of_nothing()
    assert (nothing.numerator.item(), nothing.denominator.item()) == (0.0, 0.0)
    assert torch.autograd.grad(nothing.numerator, numerator)[0] == 0


# WeightedSum


def test_a_sum_is_the_weighted_sum_of_its_parts():
    logits, labels = batch()
    parts = {"plain": LOSSES["cross_entropy"], "focal": LOSSES["focal"], "margin": LOSSES["ldam"]}
    amounts = {"plain": 1.0, "focal": -0.25, "margin": 3.0}
    options = {"focal": {"gamma": 0.5}, "margin": {"scale": 2.0}}
    loss = WeightedSum(parts, amounts, options)
    assert loss.needs_class_counts
    given = {"class_weights": WEIGHTS, "sample_weights": SAMPLES}
    found = loss(logits, labels, class_counts=COUNTS, **given)
    own = {"plain": {}, "focal": {"gamma": 0.5}, "margin": {"scale": 2.0, "class_counts": COUNTS}}
    each = {name: part(logits, labels, **given, **own[name]) for name, part in parts.items()}
    assert abs(found.numerator - sum(amounts[name] * each[name].numerator for name in parts)) < 1e-14
    assert all(torch.equal(found.denominator, terms.denominator) for terms in each.values())
    assert torch.equal(found.denominator, loss.denominator(labels, **given))

    assert loss.seen.keys() == parts.keys()
    assert all(torch.equal(loss.seen[name], each[name].numerator) for name in parts)
    assert not any(numerator.requires_grad for numerator in loss.seen.values())

    (ours,) = torch.autograd.grad(found.numerator, logits)
    theirs = sum(amounts[name] * torch.autograd.grad(each[name].numerator, logits)[0] for name in parts)
    assert (ours - theirs).abs().max() < 1e-14


def test_seen_is_of_the_last_call():
    logits, labels = batch()
    loss = WeightedSum({"one": LOSSES["focal"]}, {"one": 5.0})
    assert loss.seen == {}
    loss(logits, labels)
    first = loss.seen["one"]
    last = loss(logits * 2, labels)
    assert loss.seen["one"] != first
    assert loss.seen["one"] * 5.0 == last.numerator


def test_a_sum_keeps_the_contract():
    logits, labels = batch()
    loss = WeightedSum({"a": LOSSES["focal"], "b": Hinge()}, {"a": 1.0, "b": 0.1})
    assert not loss.needs_class_counts
    check_terms(ConfiguredLoss(check_loss(loss, "sum"), WEIGHTS), logits, labels, SAMPLES)
    check_terms(ConfiguredLoss(loss, WEIGHTS, reduction="mean"), logits, labels, SAMPLES)
    broken = WeightedSum({"a": LOSSES["focal"], "b": MeanHinge()}, {"a": 1.0, "b": 0.1})
    with pytest.raises(ValueError, match="WeightedSum has no numerator"):
        check_terms(ConfiguredLoss(broken, WEIGHTS), logits, labels)


def test_parts_that_divide_by_different_items_are_refused():
    """At any call, not the first alone: parts may agree for a while."""

    class CountsAll(type(LOSSES["bce"])):
        def _weights(self, labels, ignore_index, sample_weights):
            return torch.ones_like(labels, dtype=torch.float64)

    logits, labels = torch.zeros(4, 3), torch.ones(4, 3)
    loss = WeightedSum({"bce": LOSSES["bce"], "own": CountsAll()}, {"bce": 1.0, "own": 1.0})
    loss(logits, labels)
    with pytest.raises(ValueError, match=r"\['bce', 'own'\]: their denominators are \[9.0, 12.0\]"):
        loss(logits, labels.index_fill(0, torch.tensor(2), -100.0))
    with pytest.raises(ValueError, match="regression and classification take other labels"):
        WeightedSum({"bce": LOSSES["bce"], "mse": LOSSES["mse"]}, {"bce": 1.0, "mse": 1.0})


def test_a_tiny_clip_and_a_gamma_of_0_stay_finite():
    far = torch.tensor([[20.0]])
    terms = LOSSES["asymmetric"](far, torch.zeros(1, 1), clip=1e-9, gamma_neg=0.0)
    assert abs(terms.numerator - 20.0) < 0.7  # log(sigmoid(-20) + 1e-9), in place of log 0
    sure = torch.tensor([[0.0, -torch.inf]])
    assert LOSSES["focal"](sure, torch.tensor([0]), gamma=0.0).numerator == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("ldam", {"max_margin": math.nan}), ("ldam", {"scale": math.inf}), ("logit_adjusted", {"tau": math.nan}),
     ("focal", {"gamma": math.inf}), ("focal", {"class_weights": torch.ones(4)}),
     ("focal", {"sample_weights": torch.ones(1)}), ("cross_entropy", {"sample_weights": torch.ones(1)})],
)  # fmt: skip
def test_options_that_are_no_numbers_or_of_another_length(name, options):
    counted = {"class_counts": [1, 2]} if name in ("ldam", "logit_adjusted") else {}
    with pytest.raises(ValueError, match=next(iter(options))):
        LOSSES[name](torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), **counted, **options)


@pytest.mark.parametrize(
    ("parts", "weights", "options", "says"),
    [
        ({}, {}, None, r"sum of losses \[\]"),
        (["focal"], {}, None, r"\['focal'\] with weights {}"),
        (["focal"], {"focl": 1.0}, None, "with weights {'focl': 1.0}"),
        (["focal"], {"focal": 1.0, "bce": 1.0}, None, "each part needs one weight"),
        (
            ["focal"],
            {"focal": 1.0},
            {"focl": {"gamma": 1.0}},
            "options {'focl': {'gamma': 1.0}}: .* by the parts' names",
        ),
        (["focal"], {"focal": math.nan}, None, "weights {'focal': nan}: a weight is a finite number"),
        (["focal"], {"focal": math.inf}, None, "weights {'focal': inf}: a weight is a finite number"),
    ],
)
def test_a_sum_that_is_put_together_wrongly_is_refused(parts, weights, options, says):
    with pytest.raises(ValueError, match=says):
        WeightedSum({name: LOSSES[name] for name in parts}, weights, options)


def test_an_option_that_its_part_does_not_have_is_not_swallowed():
    logits, labels = batch()
    loss = WeightedSum({"a": LOSSES["focal"]}, {"a": 1.0}, {"a": {"tau": 1.0}})
    with pytest.raises(TypeError, match="tau"):
        loss(logits, labels)
