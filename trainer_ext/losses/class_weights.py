"""Class weights: from what the user gave (a name, a list, a dict) to one checked weight a class."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ClassWeights = str | Sequence[float] | Mapping[str | int, float]


def class_weights(
    spec: ClassWeights,
    num_labels: int,
    *,
    labels: Tensor | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Tensor:
    """One weight a class, shape (num_labels,), float64.

    Args:
        spec: `"balanced"`; or one number a class; or a dict from label (its index or its name) to weight, where
            a class that is not named weighs 1.
        num_labels: The number of classes, C.
        labels: The training labels, any shape, int64; needed by `"balanced"`. -100 does not count.
        label2id: Names of the labels, for a dict with names.

    Returns:
        For `"balanced"`, `w[c] = n / (C n_c)`: the weights of King & Zeng (2001), as scikit-learn computes them.

    Raises:
        ValueError: Unknown name or label, wrong length, a weight that is negative, NaN or infinite, all zero, or
            `"balanced"` where a class has no sample.
    """
    if isinstance(spec, str):
        if spec not in FROM_COUNTS:
            raise ValueError(
                f"class_weights={spec!r} is not known. Choices: {', '.join(FROM_COUNTS)}; a list with one number "
                "a class, such as [1.0, 2.5]; or a dict from label to weight."
            )
        if labels is None:
            raise ValueError(f"class_weights={spec!r} counts the training labels, and there are none to count.")
        return FROM_COUNTS[spec](label_counts(labels, num_labels))
    values = _from_dict(spec, num_labels, label2id or {}) if isinstance(spec, Mapping) else list(spec)
    return _checked(values, num_labels)


def label_counts(labels: Tensor, num_labels: int) -> Tensor:
    """How often each class occurs: shape (num_labels,), int64; -100 is left out."""
    return torch.bincount(labels[labels != -100].flatten(), minlength=num_labels)


def balanced(counts: Tensor) -> Tensor:
    """`n / (C n_c)`, float64: every class has the same total weight, the mean weight of a sample is 1."""
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"class_weights='balanced': the training labels have no sample of class {missing}, so its weight would be "
            "infinite. Give the weights yourself, or train on data that has every class."
        )
    return counts.sum().double() / (len(counts) * counts.double())


FROM_COUNTS = {"balanced": balanced}


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
