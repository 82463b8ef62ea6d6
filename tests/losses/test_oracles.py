"""Every loss against an oracle that shares no code with it, its identities, and the inputs that break naive forms."""

import functools
import math

import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

from tests.losses import oracles
from trainer_ext.losses import LOSSES, WeightedSum

COUNTS = [50.0, 7.0, 2.0]
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
SAMPLES = torch.tensor([0.25, 1.0, 0.0, 3.0, 1.5, 0.7, 2.0, 1.0], dtype=torch.float64)
REGRESSION = ("huber", "mse")
ELEMENTS = ("asymmetric", "bce", *REGRESSION)
CLASSES = tuple(name for name in LOSSES if name not in ELEMENTS)
COUNTED = ("ldam", "logit_adjusted")

CLASS_CASES = [
    ("cross_entropy", {}),
    ("focal", {}),
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 5.0}),
    ("logit_adjusted", {}),
    ("logit_adjusted", {"tau": 1.7}),
    ("logit_adjusted", {"tau": -0.5}),
    ("ldam", {}),
    ("ldam", {"max_margin": 1.3, "scale": 3.0}),
]
ELEMENT_CASES = [
    ("asymmetric", {}),
    ("asymmetric", {"gamma_neg": 2.0, "gamma_pos": 0.0, "clip": 0.2}),
    ("asymmetric", {"gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.0}),
    ("bce", {}),
    ("bce", {"pos_weight": 3.5}),
    ("huber", {}),
    ("huber", {"delta": 0.3}),
    ("mse", {}),
]
CASES = CLASS_CASES + ELEMENT_CASES


def counted(name, options):
    return {"class_counts": COUNTS, **options} if name in COUNTED else dict(options)


def batch(name, shape=(8, 3), *, seed=0, ignored=True):
    """Logits of shape (..., C) in float64 and labels that fit the loss, some ignored where it has such labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if name in REGRESSION:
        labels = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif name in ELEMENTS:
        labels = torch.randint(0, 2, shape, generator=generator).double()
    else:
        labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    if ignored and name not in REGRESSION:
        labels.view(-1)[1::4] = -100
    return logits.requires_grad_(), labels


def oracle_sums(name, logits, labels, options, class_weights=None, sample_weights=None):
    item = functools.partial(getattr(oracles, name), **({"counts": COUNTS} if name in COUNTED else {}), **options)
    lists = [t.tolist() if torch.is_tensor(t) else t for t in (class_weights, sample_weights)]
    if name in ELEMENTS:
        return oracles.element_sums(
            logits.tolist(), labels.tolist(), item, *lists, ignored=None if name in REGRESSION else -100
        )
    return oracles.class_sums(logits.tolist(), labels.tolist(), item, *lists)


def close(found, expected, tolerance=1e-14):
    """Whether two numbers or tensors agree relative to their size; a NaN never agrees."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


# Values


@pytest.mark.parametrize(
    ("name", "options", "class_weights"),
    [(*case, None) for case in CASES] + [(*case, WEIGHTS) for case in CASES if case[0] not in REGRESSION],
)
@pytest.mark.parametrize("sample_weights", [None, SAMPLES])
def test_both_sums_are_the_papers(name, options, class_weights, sample_weights):
    for seed in range(3):
        logits, labels = batch(name, seed=seed)
        given = {"class_weights": class_weights, "sample_weights": sample_weights}
        found = LOSSES[name](logits, labels, **given, **counted(name, options))
        numerator, denominator = oracle_sums(name, logits, labels, options, **given)
        assert close(found.numerator, numerator)
        assert close(found.denominator, denominator)
        assert close(found.mean(), numerator / denominator)
        # Announced before the forward, to the last bit, and in float64.
        assert torch.equal(found.denominator, LOSSES[name].denominator(labels, **given))
        assert found.denominator.dtype == torch.float64
        assert found.numerator.shape == found.denominator.shape == ()


@pytest.mark.parametrize(("name", "options"), CLASS_CASES)
def test_tokens_are_items(name, options):
    logits, labels = batch(name, (4, 5, 3))
    given = {"class_weights": WEIGHTS, "sample_weights": SAMPLES[:4]}
    found = LOSSES[name](logits, labels, **given, **counted(name, options))
    numerator, denominator = oracle_sums(name, logits, labels, options, **given)
    assert close(found.numerator, numerator)
    assert close(found.denominator, denominator)
    per_token = SAMPLES[:4].unsqueeze(1).expand(4, 5)
    again = LOSSES[name](logits, labels, **{**given, "sample_weights": per_token}, **counted(name, options))
    assert close(again.numerator, numerator)


@pytest.mark.parametrize(
    ("name", "option"), [("cross_entropy", {}), ("ldam", {"max_margin": 0.0}), ("logit_adjusted", {"tau": 0.0})]
)
def test_label_smoothing_is_the_papers(name, option):
    logits, labels = batch(name)
    found = LOSSES[name](logits, labels, class_weights=WEIGHTS, label_smoothing=0.2, **counted(name, option))
    pairs = [(row, y) for row, y in zip(logits.tolist(), labels.tolist(), strict=True) if y != -100]
    assert close(found.numerator, sum(oracles.smoothed(row, y, WEIGHTS.tolist(), 0.2) for row, y in pairs))
    assert found.denominator == sum(WEIGHTS[y] for _, y in pairs)


def test_cross_entropy_is_scikit_learns_log_loss():
    logits, labels = batch("cross_entropy", (40, 3), ignored=False)
    samples = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = LOSSES["cross_entropy"](logits, labels, sample_weights=samples).mean()
    probabilities = logits.detach().softmax(-1).numpy()
    oracle = log_loss(labels.numpy(), probabilities, sample_weight=samples.numpy(), labels=[0, 1, 2])
    assert close(found, oracle)


@pytest.mark.parametrize("pos_weight", [None, 2.5, [1.0, 4.0, 0.3]])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_bce_is_pytorchs_with_its_gradient(pos_weight, weight):
    logits, labels = batch("bce", ignored=False)
    found = LOSSES["bce"](logits, labels, class_weights=weight, pos_weight=pos_weight).mean()
    (ours,) = torch.autograd.grad(found, logits)
    given = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
    oracle = nn.BCEWithLogitsLoss(weight=weight, pos_weight=given)(logits, labels)
    assert close(found, oracle)
    assert close(ours, torch.autograd.grad(oracle, logits)[0])


@pytest.mark.parametrize(
    ("name", "options", "oracle"),
    [
        ("mse", {}, nn.MSELoss()),
        ("huber", {}, nn.HuberLoss()),
        ("huber", {"delta": 0.2}, nn.HuberLoss(delta=0.2)),
        ("huber", {"delta": 10.0}, nn.HuberLoss(delta=10.0)),
        ("huber", {}, nn.SmoothL1Loss()),
    ],
)
def test_regression_is_pytorchs_with_its_gradient(name, options, oracle):
    logits, labels = batch(name)
    found, expected = LOSSES[name](logits, labels, **options).mean(), oracle(logits, labels)
    assert close(found, expected)
    assert close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0])


# Gradients


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_are_those_of_finite_differences(name, options):
    logits, labels = batch(name, (5, 3))
    if name == "huber":
        assert ((logits - labels).abs() - options.get("delta", 1.0)).abs().min() > 1e-3  # away from the kink
    if options.get("clip", 0.05) and name == "asymmetric":
        assert (torch.sigmoid(logits) - options.get("clip", 0.05)).abs().min() > 1e-3
    given = {} if name in REGRESSION else {"class_weights": WEIGHTS}

    def mean(z):
        return LOSSES[name](z, labels, sample_weights=SAMPLES[:5], **given, **counted(name, options)).mean()

    assert torch.autograd.gradcheck(mean, (logits,))


# Identities


def numerators_and_gradients(logits, labels, *losses):
    for name, options in losses:
        numerator = LOSSES[name](logits, labels, **options).numerator
        yield numerator, torch.autograd.grad(numerator, logits)[0]


UNIFORM = {"class_counts": [4, 4, 4]}
WEIGHTED = {"class_weights": WEIGHTS, "sample_weights": SAMPLES}


@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("focal", {"gamma": 0.0, **WEIGHTED}, "cross_entropy"),
        ("logit_adjusted", {"tau": 0.0, "class_counts": COUNTS, **WEIGHTED}, "cross_entropy"),
        ("logit_adjusted", {**UNIFORM, **WEIGHTED}, "cross_entropy"),
        ("logit_adjusted", {**UNIFORM, "tau": 2.5, **WEIGHTED}, "cross_entropy"),
        ("ldam", {"max_margin": 0.0, "class_counts": COUNTS, **WEIGHTED}, "cross_entropy"),
        ("asymmetric", {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0, **WEIGHTED}, "bce"),
        ("bce", {"pos_weight": 1.0, **WEIGHTED}, "bce"),
    ],
)
def test_a_loss_without_its_own_idea_is_the_plain_one(name, options, same):
    logits, labels = batch(name)
    (one, gradient), (other, its_gradient) = numerators_and_gradients(
        logits, labels, (name, options), (same, WEIGHTED)
    )
    assert close(one, other)
    assert close(gradient, its_gradient)


@pytest.mark.parametrize("name", CLASSES)
def test_equal_class_weights_are_none(name):
    logits, labels = batch(name)
    plain, weighted = (
        LOSSES[name](logits, labels, class_weights=weights, **counted(name, {}))
        for weights in (None, torch.full((3,), 1.7, dtype=torch.float64))
    )
    assert close(weighted.mean(), plain.mean())
    assert close(weighted.numerator, 1.7 * plain.numerator)


def test_huber_with_a_large_delta_is_half_the_squared_error():
    logits, labels = batch("huber")
    huber, mse = LOSSES["huber"](logits, labels, delta=1e6), LOSSES["mse"](logits, labels)
    assert close(huber.numerator, mse.numerator / 2)


def test_huber_with_a_small_delta_is_delta_times_the_absolute_error():
    logits, labels = batch("huber")
    assert close(LOSSES["huber"](logits, labels, delta=1e-9).numerator / 1e-9, (logits - labels).abs().sum(), 1e-8)


@pytest.mark.parametrize("name", COUNTED)
def test_counts_and_the_prior_are_the_same(name):
    logits, labels = batch(name)
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    counts, priors = (LOSSES[name](logits, labels, class_counts=given) for given in (COUNTS, prior.double()))
    assert close(counts.numerator, priors.numerator, 1e-7)  # the prior is rounded to float32


def test_logit_adjustment_favours_rare_classes():
    even = torch.zeros(1, 3, dtype=torch.float64)
    losses = [
        float(LOSSES["logit_adjusted"](even, torch.tensor([c]), class_counts=COUNTS).numerator) for c in range(3)
    ]
    assert losses == sorted(losses)  # an even guess costs most where the right class is rare
    assert close(losses, [-math.log(n / sum(COUNTS)) for n in COUNTS])  # and it costs the prior's surprise


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_whole_sample_weights_repeat_rows(name, options, shape):
    logits, labels = batch(name, shape)
    counts = torch.tensor([2, 0, 1, 3])
    given = {**counted(name, options), **({} if name in REGRESSION else {"class_weights": WEIGHTS})}
    weighted = LOSSES[name](logits, labels, sample_weights=counts, **given)
    repeated = LOSSES[name](logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts, 0), **given)
    assert close(weighted.numerator, repeated.numerator)
    assert close(weighted.denominator, repeated.denominator)
    grads = [torch.autograd.grad(terms.mean(), logits)[0] for terms in (weighted, repeated)]
    assert close(*grads)


# Shapes and labels


@pytest.mark.parametrize(("name", "options"), ELEMENT_CASES)
def test_one_label_a_row_fits_one_logit_a_row(name, options):
    logits, labels = batch(name, (8, 1))
    given = {"sample_weights": SAMPLES, **options}
    flat, full = (LOSSES[name](logits, target, **given) for target in (labels.squeeze(1), labels))
    assert torch.equal(flat.numerator, full.numerator)
    assert torch.equal(flat.denominator, full.denominator)
    assert torch.equal(flat.denominator, LOSSES[name].denominator(labels.squeeze(1), sample_weights=SAMPLES))
    assert flat.denominator <= SAMPLES.sum()  # 8 labels and 8 logits make 8 elements, not 64


@pytest.mark.parametrize(("name", "options"), CASES)
def test_ignored_items_give_nothing_and_take_no_gradient(name, options):
    if name in REGRESSION:
        logits, labels = batch(name)
        labels[0, 0] = -100.0  # a number like any other
        assert LOSSES[name].denominator(labels) == 24
        here, there = (
            LOSSES[name](logits, labels.index_fill(0, torch.tensor(0), x), **options) for x in (-100.0, 0.0)
        )
        assert here.numerator > there.numerator + 20
        return
    logits, labels = batch(name)
    ignored = labels == -100
    assert ignored.any()
    given = {"class_weights": WEIGHTS, **counted(name, options)}
    found = LOSSES[name](logits, labels, **given)
    (gradient,) = torch.autograd.grad(found.numerator, logits)
    assert gradient.isfinite().all()
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    elsewhere = logits.detach().clone()
    elsewhere[ignored] = 77.0
    assert close(LOSSES[name](elsewhere, labels, **given).numerator, found.numerator)
    other_label = torch.where(ignored, -1, labels)  # the ignored label is an option
    assert close(LOSSES[name](logits, other_label, ignore_index=-1, **given).numerator, found.numerator)
    assert LOSSES[name].denominator(other_label, ignore_index=-1, class_weights=WEIGHTS) == found.denominator


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in REGRESSION])
def test_nothing_to_learn_is_zero_and_not_nan(name, options):
    logits, labels = batch(name)
    terms = LOSSES[name](logits, torch.full_like(labels, -100), class_weights=WEIGHTS, **counted(name, options))
    loss = terms.mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (loss.item(), terms.denominator.item()) == (0.0, 0.0)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_sample_of_weight_zero_may_hold_anything():
    for name in ELEMENTS:
        logits, labels = batch(name)
        labels[2] = torch.nan
        (gradient,) = torch.autograd.grad(LOSSES[name](logits, labels, sample_weights=SAMPLES).mean(), logits)
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()


# Extremes and dtypes

EXTREME = [
    *[("focal", {"gamma": gamma}) for gamma in (0.0, 0.5, 2.0)],
    ("cross_entropy", {}),
    ("logit_adjusted", {}),
    ("ldam", {}),
    ("bce", {"pos_weight": 2.0}),
    *[("asymmetric", {"gamma_neg": g, "gamma_pos": g, "clip": c}) for g in (0.0, 0.5, 2.0) for c in (0.0, 0.05)],
    (
        "asymmetric",
        {"gamma_neg": 0.5, "clip": 0.5},
    ),  # a logit of 0 has a shifted probability of 0: its root has no slope
    ("huber", {}),
    ("mse", {}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "options"), EXTREME)
def test_extreme_logits_leave_loss_and_gradient_finite(name, options, dtype):
    values = [-1e4, -200.0, -104.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 17.0, 20.0, 88.0, 104.0, 200.0, 1e4]
    logits = torch.tensor([[a, b, 0.0] for a in values for b in values], dtype=dtype, requires_grad=True)
    items = logits.shape if name in ELEMENTS else logits.shape[:-1]
    for label in range(2):
        labels = torch.full(items, float(label) if name in ELEMENTS else label)
        numerator = LOSSES[name](logits, labels, **counted(name, options)).numerator
        (gradient,) = torch.autograd.grad(numerator, logits)
        assert numerator.dtype == torch.float32
        assert numerator.isfinite()
        assert numerator >= 0
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [-1e4, -100.0, -20.0, -3.0, 3.0, 20.0, 40.0, 100.0, 1e4])
def test_focal_where_probabilities_round_to_0_or_1(gamma, gap):
    """Two classes `gap` apart: `1 - p = s(-gap)`, so the loss is `s(-gap)^gamma softplus(-gap)`; s the sigmoid."""
    softplus, rest = (
        (math.log1p(math.exp(-gap)), math.exp(-gap) / (1 + math.exp(-gap)))
        if gap > 0
        else (
            -gap + math.log1p(math.exp(gap)),
            1 / (1 + math.exp(gap)),
        )
    )
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)
    found = LOSSES["focal"](logits, torch.tensor([0]), gamma=gamma).numerator
    (gradient,) = torch.autograd.grad(found, logits)
    slope = -(rest**gamma) * (gamma * (1 - rest) * softplus + rest)
    assert abs(found.item() - rest**gamma * softplus) <= 1e-6 * max(1.0, softplus)
    assert abs(gradient[0, 0].item() - slope) <= 1e-6
    assert abs(gradient[0].sum().item()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_precision_logits_are_raised_first(name, options, dtype):
    logits, labels = batch(name)
    half = logits.detach().to(dtype)
    given = {"sample_weights": SAMPLES.to(dtype), **counted(name, options)}
    found = LOSSES[name](half, labels, **given)
    exact = LOSSES[name](half.double(), labels, **given)
    assert (found.numerator.dtype, found.denominator.dtype) == (torch.float32, torch.float64)
    assert close(found.numerator, exact.numerator, 1e-6)
    assert torch.equal(found.denominator, exact.denominator)
    assert torch.equal(found.denominator, LOSSES[name].denominator(labels, sample_weights=SAMPLES.to(dtype)))


def test_a_denominator_of_many_items_is_exact():
    """Sums in float32 stop counting at 2^24 = 16777216; a denominator goes on."""
    labels = torch.zeros(2**24 + 3, dtype=torch.int8)
    assert LOSSES["cross_entropy"].denominator(labels) == 2**24 + 3
    assert LOSSES["bce"].denominator(labels) == 2**24 + 3


# Wrong arguments

Z, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
T = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("name", "logits", "labels", "options", "says"),
    [
        ("focal", Z, Y, {"gamma": -1.0}, "gamma=-1.0"),
        ("focal", Z, Y, {"gamma": math.nan}, "gamma=nan"),
        ("asymmetric", Z, T, {"clip": 1.0}, "clip=1.0"),
        ("asymmetric", Z, T, {"clip": -0.1}, "clip=-0.1"),
        ("asymmetric", Z, T, {"gamma_neg": -2.0}, "gamma_neg=-2.0"),
        ("asymmetric", Z, T, {"gamma_pos": math.nan}, "gamma_pos=nan"),
        ("huber", Z, T, {"delta": 0.0}, "delta=0.0"),
        ("huber", Z, T, {"delta": math.nan}, "delta=nan"),
        ("ldam", Z, Y, {"scale": 0.0, "class_counts": COUNTS}, "scale=0.0"),
        *[
            (name, Z, Y, {"class_counts": counts}, says)
            for name in COUNTED
            for counts, says in [
                (None, "needs class_counts"),
                ([1.0, 0.0, 2.0], r"class_counts=\[1.0, 0.0, 2.0\]"),
                ([1.0, 2.0], r"class_counts=\[1.0, 2.0\]"),
                ([1.0, 2.0, math.inf], r"class_counts=\[1.0, 2.0, inf\]"),
                ([1.0, 2.0, math.nan], r"class_counts=\[1.0, 2.0, nan\]"),
                ([[1.0, 2.0, 3.0]], r"class_counts=\[\[1.0"),
            ]
        ],
        ("bce", Z, T, {"pos_weight": [1.0, 2.0]}, r"pos_weight=\[1.0, 2.0\]"),
        ("bce", Z, T, {"pos_weight": [1.0, 2.0, -1.0]}, r"pos_weight=\[1.0, 2.0, -1.0\]"),
        ("bce", Z, T, {"pos_weight": 0.0}, r"pos_weight=0.0"),
        ("bce", Z, T, {"class_weights": WEIGHTS[:2]}, r"class_weights=\[0.5, 2.0\]"),
        ("bce", Z[:, :1], T[:, 0], {"class_weights": WEIGHTS[:2]}, r"class_weights=\[0.5, 2.0\]"),
        ("mse", Z, T, {"class_weights": WEIGHTS}, "class_weights: regression has no classes"),
        ("huber", Z, T, {"class_weights": WEIGHTS}, "class_weights: regression has no classes"),
        *[(name, Z, T[:3], {}, r"labels of shape \(3, 3\) for logits of shape \(4, 3\)") for name in ELEMENTS],
        *[(name, Z, T[:, 0], {}, r"labels of shape \(4,\) for logits of shape \(4, 3\)") for name in ELEMENTS],
        *[(name, Z, T.T, {}, r"labels of shape \(3, 4\) for logits of shape \(4, 3\)") for name in ELEMENTS],
        *[(name, Z, T.flatten(), {}, r"labels of shape \(12,\) for logits of shape \(4, 3\)") for name in ELEMENTS],
        ("focal", Z, Y[:3], {}, r"labels of shape \(3,\) for logits of shape \(4, 3\)"),
        ("focal", Z, Y[:1], {}, r"labels of shape \(1,\) for logits of shape \(4, 3\)"),
        ("ldam", Z, Y[:3], {"class_counts": COUNTS}, r"labels of shape \(3,\) for logits of shape \(4, 3\)"),
        ("logit_adjusted", Z, Y[:3], {"class_counts": COUNTS}, r"labels of shape \(3,\) for logits of shape \(4"),
        ("cross_entropy", Z, Y[:1], {}, r"labels of shape \(1,\) for logits of shape \(4"),
    ],
)
def test_wrong_arguments_are_named(name, logits, labels, options, says):
    with pytest.raises(ValueError, match=says):
        LOSSES[name](logits, labels, **options)


# What the checks above would catch: each is a mistake that published code has made


def differs(name, wrong, **given):
    """Whether a mistaken item loss is told from the right one by the comparison that the oracles use."""
    logits, labels = batch(name)
    if name in ELEMENTS:
        numerator, _ = oracles.element_sums(logits.tolist(), labels.tolist(), wrong, ignored=-100)
    else:
        numerator, _ = oracles.class_sums(logits.tolist(), labels.tolist(), wrong)
    return not close(LOSSES[name](logits, labels, **given).numerator, numerator, 1e-3)


def test_focal_with_weighted_probabilities_is_caught():
    logits, labels = batch("focal")
    negative = nn.functional.cross_entropy(logits, labels, weight=WEIGHTS, reduction="none", ignore_index=-100)
    mistaken = ((1 - torch.exp(-negative)) ** 2 * negative).sum()  # p is of the weighted log-likelihood
    found = LOSSES["focal"](logits, labels, class_weights=WEIGHTS).numerator
    assert not close(found, mistaken, 1e-2)


def test_focal_from_one_minus_p_has_no_gradient_where_p_rounds_to_one():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)
    p = logits.softmax(-1)[0, 0]
    (naive,) = torch.autograd.grad((1 - p) ** 0.5 * -p.log(), logits)
    assert not naive.isfinite().all()


def test_ldam_margins_with_another_exponent_are_caught():
    assert differs("ldam", functools.partial(oracles.ldam, counts=COUNTS, exponent=0.5), class_counts=COUNTS)
    assert not differs("ldam", functools.partial(oracles.ldam, counts=COUNTS), class_counts=COUNTS)


def test_ldam_margins_outside_the_scale_are_caught():
    def outside(row, label):
        margins = [0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]
        return oracles.cross_entropy([3 * x - (margins[label] if c == label else 0) for c, x in enumerate(row)], label)

    assert differs("ldam", outside, class_counts=COUNTS, scale=3.0)


def test_logit_adjustment_of_the_wrong_sign_is_caught():
    assert differs(
        "logit_adjusted", functools.partial(oracles.logit_adjusted, counts=COUNTS, tau=-1.0), class_counts=COUNTS
    )


@pytest.mark.parametrize("mistake", ["swapped gammas", "no clip", "a clip of the logarithm's argument only"])
def test_asymmetric_mistakes_are_caught(mistake):
    def half_clipped(x, target):
        p = 1 / (1 + math.exp(-x))
        negative = p**4 * math.log(1 - max(p - 0.05, 0))
        return -target * (1 - p) * math.log(p) - (1 - target) * negative

    wrong = {
        "swapped gammas": functools.partial(oracles.asymmetric, gamma_neg=1.0, gamma_pos=4.0),
        "no clip": functools.partial(oracles.asymmetric, clip=0.0),
        "a clip of the logarithm's argument only": half_clipped,
    }[mistake]
    assert differs("asymmetric", wrong)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in REGRESSION])
def test_a_mean_of_means_is_caught(name):
    logits, labels = batch(name)
    given = {"class_weights": WEIGHTS, **counted(name, {})}
    parts = [
        LOSSES[name](*part, **given).mean()
        for part in zip(logits.split([1, 2, 5]), labels.split([1, 2, 5]), strict=True)
    ]
    assert not close(torch.stack(parts).mean(), LOSSES[name](logits, labels, **given).mean(), 1e-2)


def test_bce_divided_by_the_sum_of_its_weights_is_caught():
    logits, labels = batch("bce", ignored=False)
    found = LOSSES["bce"](logits, labels, class_weights=WEIGHTS)
    oracle = nn.BCEWithLogitsLoss(weight=WEIGHTS)(logits, labels)
    assert close(found.numerator / found.denominator, oracle)
    assert not close(found.numerator / WEIGHTS.expand(8, 3).sum(), oracle, 1e-2)


def test_a_sum_of_losses_is_the_sum_of_its_oracles():
    logits, labels = batch("focal")
    loss = WeightedSum({"a": LOSSES["focal"], "b": LOSSES["ldam"]}, {"a": 0.7, "b": 0.2}, {"a": {"gamma": 1.0}})
    given = {"class_weights": WEIGHTS, "sample_weights": SAMPLES}
    focal, denominator = oracle_sums("focal", logits, labels, {"gamma": 1.0}, **given)
    ldam, _ = oracle_sums("ldam", logits, labels, {}, **given)
    found = loss(logits, labels, class_counts=COUNTS, **given)
    assert close(found.numerator, 0.7 * focal + 0.2 * ldam)
    assert close(found.denominator, denominator)
