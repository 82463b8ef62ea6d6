"""Class weights: from what the user gave (a name, a list, a dict) to one checked weight a class."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

ClassWeights = str | Sequence[float] | Mapping[str | int, float]


def class_weights(
    spec: ClassWeights,
    num_labels: int,
    *,
    labels: Tensor | None = None,
    class_counts: Sequence[float] | Tensor | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Tensor:
    """One weight a class, shape (num_labels,), float64.

    Args:
        spec: A name in `FROM_COUNTS` (`"balanced"`, `"effective_number"`, `"inverse_sqrt"`); or one number a class;
            or a dict from label (its index or its name) to weight, where a class that is not named weighs 1.
        num_labels: The number of classes, C.
        labels: The training labels, any shape, int64, which a name counts. -100 does not count.
        class_counts: Instead of labels, how often each class occurs, or its prior: shape (C,).
        label2id: Names of the labels, for a dict with names.

    Raises:
        ValueError: Unknown name or label, wrong length, a weight that is negative, NaN or infinite, all zero, or
            a name where a class has no sample.
    """
    if isinstance(spec, str):
        if spec not in FROM_COUNTS:
            raise ValueError(
                f"class_weights={spec!r} is not known. Choices: {', '.join(FROM_COUNTS)}; a list with one number "
                "a class, such as [1.0, 2.5]; or a dict from label to weight."
            )
        if class_counts is None and labels is None:
            raise ValueError(f"class_weights={spec!r} counts the training labels, and there are none to count.")
        return FROM_COUNTS[spec](_known_counts(spec, labels, class_counts, num_labels))
    values = _from_dict(spec, num_labels, label2id or {}) if isinstance(spec, Mapping) else list(spec)
    return _checked(values, num_labels)


def label_counts(labels: Tensor, num_labels: int) -> Tensor:
    """How often each class occurs: shape (num_labels,), int64; -100 is left out."""
    return torch.bincount(labels[labels != -100].flatten(), minlength=num_labels)


def balanced(counts: Tensor) -> Tensor:
    """`n / (C n_c)`, float64: every class has the same total weight, the mean weight of a sample is 1.

    The weights of King & Zeng (2001), as scikit-learn computes them.
    """
    return counts.sum().double() / (len(counts) * counts.double())


def effective_number(counts: Tensor, beta: float = 0.999) -> Tensor:
    """`(1 - beta) / (1 - beta^n_c)`, scaled to the sum C, float64 (Cui et al. 2019, https://arxiv.org/abs/1901.05555).

    Samples of a class overlap: the n-th adds `beta^(n-1)` to what is known of it. With `beta=0` all weights are 1,
    towards 1 they become those of the inverse counts.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta={beta}: the effective number takes 0 <= beta < 1.")
    if counts.min() < 1:
        raise ValueError(f"the effective number needs counts from 1, and was given {counts.tolist()}.")
    exponents = counts.double() * math.log(beta) if beta else torch.full_like(counts, -math.inf, dtype=torch.float64)
    return _sum_of_c(1 / -torch.expm1(exponents))


def inverse_sqrt(counts: Tensor) -> Tensor:
    """`1 / sqrt(n_c)`, scaled to the sum C, float64: between no weights and balanced ones."""
    return _sum_of_c(counts.double().rsqrt())


FROM_COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "balanced": balanced,
    "effective_number": effective_number,
    "inverse_sqrt": inverse_sqrt,
}


def _sum_of_c(weights: Tensor) -> Tensor:
    return weights * (len(weights) / weights.sum())


def _known_counts(
    spec: str, labels: Tensor | None, class_counts: Sequence[float] | Tensor | None, num_labels: int
) -> Tensor:
    """How often each class occurs: at least once, or its weight would be infinite."""
    if class_counts is None:
        assert labels is not None
        kept = labels[labels != -100]
        if labels.is_floating_point() or (len(kept) and not (kept.min() >= 0 and kept.max() < num_labels)):
            raise ValueError(
                f"class_weights={spec!r} counts labels that are integers in 0..{num_labels - 1}, or -100."
            )
        counts = label_counts(labels, num_labels)
    else:
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.shape != (num_labels,) or not (counts >= 0).all() or not counts.isfinite().all():
        raise ValueError(f"class_counts={counts.tolist()}: give one number from 0 for each of {num_labels} classes.")
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"class_weights={spec!r}: the training labels have no sample of class {missing}, so its weight would be "
            "infinite. Give the weights yourself, or train on data that has every class."
        )
    return counts


def _from_dict(spec: Mapping[str | int, float], num_labels: int, label2id: Mapping[str, int]) -> list[float]:
    index = {str(i): i for i in range(num_labels)} | {str(name): i for name, i in label2id.items()}
    unknown = [key for key in spec if str(key) not in index]
    if unknown:
        raise ValueError(f"class_weights names the label {unknown[0]!r}; the labels are {', '.join(index)}.")
    values = [1.0] * num_labels
    for key, weight in spec.items():
        values[index[str(key)]] = weight
    return values


def _checked(values: list[float], num_labels: int) -> Tensor:
    if len(values) != num_labels:
        raise ValueError(f"class_weights has {len(values)} weights {values}; the model has {num_labels} labels.")
    try:
        weights = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_weights={values} must be numbers: {error}.") from error
    bad = [
        (i, value) for i, value in enumerate(values) if not (torch.isfinite(weights[i].float()) and weights[i] >= 0)
    ]
    if bad:
        raise ValueError(
            f"class_weights[{bad[0][0]}] is {bad[0][1]}: a weight is a finite number (of float32), 0 or more."
        )
    if not weights.any():
        raise ValueError(f"class_weights={values}: all weights are 0, so that nothing would be learnt.")
    return weights
