"""What a loss is here: a numerator and a denominator, both additive over items.

For one optimizer step let S be all items (samples, tokens or elements) of all micro-batches on all
data-parallel ranks, each once. A loss returns, for any part of S, two sums over the items of that part:

    numerator    sum_i w_i l_i
    denominator  sum_i w_i          (of items that are not ignored)

and the step's loss is

    L(S) = sum(numerators) / sum(denominators)

PyTorch's mean reduction over S as one batch. The denominator is a function of the labels alone, so it is
known for the whole step before the first forward; each micro-batch then contributes `numerator / total` and
the gradients add up to the gradient of L(S), however S was split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainer_ext.import_path import imported

IGNORE_INDEX = -100


class LossTerms(NamedTuple):
    """The two sums of a loss over the items of one micro-batch.

    Attributes:
        numerator: Scalar tensor, `sum_i w_i l_i`, in the logits' dtype, float32 at least; carries the gradient.
        denominator: Scalar tensor, `sum_i w_i`, in float64 where the device has it; a function of labels only.
    """

    numerator: Tensor
    denominator: Tensor

    def of_nothing(self) -> "LossTerms":
        """Both sums as 0, still joined to the graph: for a rank that runs its forward with no item of its own."""
        return LossTerms(self.numerator.nan_to_num() * 0, self.denominator * 0)

    def mean(self) -> Tensor:
        """The loss over these items alone, a scalar; 0 where nothing counts (never NaN)."""
        return divide(self.numerator, self.denominator)


@runtime_checkable
class Loss(Protocol):
    """The shape of every entry of `LOSSES`, and of a loss of your own."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
    ) -> LossTerms:
        """The two sums over one micro-batch; options of its own come as further keywords."""
        ...

    def denominator(
        self,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The denominator that `__call__` will return for these labels, known before any forward."""
        ...


@dataclass(frozen=True)
class ConfiguredLoss:
    """A loss with everything bound that does not change from batch to batch.

    Attributes:
        loss: An entry of `LOSSES`, or a loss of the user's own.
        class_weights: Shape (C,), float64, or None.
        reduction: `"weighted_mean"` divides by the sum of the weights, as PyTorch does; `"mean"` divides by
            the number of items, so that weights also change the size of the loss.
        options: Further keyword arguments of the loss, such as `label_smoothing`.
        class_counts: How often each class occurs in training, where it is known; a loss that asks for it gets it.
        reweight_after: The share of training after which class weights count (Cao et al. 2019, deferred
            re-weighting); 0, always. Evaluation always uses them.
    """

    loss: Loss
    class_weights: Tensor | None = None
    reduction: str = "weighted_mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    class_counts: list[float] | None = None
    reweight_after: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, sample_weights: Tensor | None = None) -> LossTerms:
        given = {**self.options, "class_weights": self.class_weights}
        if getattr(self.loss, "needs_class_counts", False):
            given["class_counts"] = self.class_counts
        if sample_weights is not None:
            given["sample_weights"] = sample_weights
        terms = self.loss(logits, labels, **given)
        if self.reduction == "mean":
            return LossTerms(terms.numerator, self.denominator(labels, sample_weights))
        return terms

    def denominator(self, labels: Tensor, sample_weights: Tensor | None = None) -> Tensor:
        """Scalar tensor: what `__call__` will return as denominator for these labels."""
        weights = None if self.reduction == "mean" else self.class_weights
        given: dict[str, Any] = {} if sample_weights is None else {"sample_weights": sample_weights}
        return self.loss.denominator(labels, class_weights=weights, **given)

    def at(self, progress: float) -> "ConfiguredLoss":
        """The loss at a point of training, from 0 at its start to 1 at its end."""
        return self if progress >= self.reweight_after else replace(self, class_weights=None)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator` in the numerator's dtype; 0 where the denominator is 0."""
    if denominator.device.type == "cpu" and denominator.item():  # a look costs nothing here, and saves most of it
        return numerator / denominator.to(numerator.dtype)
    nothing = denominator == 0
    return torch.where(nothing, 0.0, numerator) / denominator.masked_fill(nothing, 1).to(numerator.dtype)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which denominators are summed: float64, so that the order of summation does not show."""
    return torch.float32 if device.type == "mps" else torch.float64


def item_weights(
    labels: Tensor, class_weights: Tensor | None, ignore_index: int, sample_weights: Tensor | None
) -> Tensor:
    """The weight of every item, shaped as `labels` (integer class indices), 0 where the label is ignored.

    Args:
        labels: Integers, shape (B,) or (B, T).
        class_weights: Shape (C,) or None.
        ignore_index: The label that does not count.
        sample_weights: Shape (B,) or the shape of `labels`, or None.
    """
    dtype = exact_dtype(labels.device)
    kept = labels != ignore_index
    weights = kept.to(dtype)
    if class_weights is not None:
        table = class_weights.to(device=labels.device, dtype=dtype)
        weights = weights * table[labels.masked_fill(~kept, 0)]
    if sample_weights is not None:
        weights = weights * of_samples(sample_weights, labels, dtype)
    return weights


def of_samples(sample_weights: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of shape (B,), or that of `labels`, with as many dimensions as `labels`.

    Raises:
        ValueError: Their shape is another.
    """
    if sample_weights.shape != labels.shape[: sample_weights.ndim]:
        raise ValueError(
            f"sample_weights of shape {tuple(sample_weights.shape)} for labels of shape {tuple(labels.shape)}: give one a "
            "sample, or one a label."
        )
    shape = sample_weights.shape + (1,) * (labels.ndim - sample_weights.ndim)
    return sample_weights.to(device=labels.device, dtype=dtype).reshape(shape)


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits raised to float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_shapes(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> None:
    """Hold labels, (...), and class weights, (C,), to logits, (..., C): smaller ones would be repeated in silence.

    Raises:
        ValueError: There is not one label for every item, or not one weight for every class.
    """
    if class_weights is not None and class_weights.shape != logits.shape[-1:]:
        raise ValueError(
            f"class_weights of shape {tuple(class_weights.shape)} for logits of shape {tuple(logits.shape)}: the loss "
            "takes one for each class."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}: the loss takes one label "
            f"an item, shape {tuple(logits.shape[:-1])}."
        )


class ClassLoss:
    """The denominator of a loss that goes by one class an item: the sum of the items' weights."""

    def denominator(
        self,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Scalar, float64 where the device has it: the sum of the weights of the labels that count."""
        if class_weights is None and sample_weights is None:
            return (labels != ignore_index).sum(dtype=exact_dtype(labels.device))
        return item_weights(labels, class_weights, ignore_index, sample_weights).sum()


def import_loss(path: str) -> Loss:
    """The loss that an import path names, such as `my_package.losses:dice`.

    Raises:
        ValueError: There is no such module or name, or what it names is not a `Loss`.
    """
    found = imported(path, "loss")
    return check_loss(found() if isinstance(found, type) else found, path)


def check_loss(loss: Callable[..., Any], name: str) -> Loss:
    """`loss` itself, once it is known to offer both halves of the contract.

    Raises:
        ValueError: `loss` cannot be called or has no `denominator` method.
    """
    if not callable(loss) or not callable(getattr(loss, "denominator", None)):
        raise ValueError(  # noqa: TRY004  a wrong argument like any other, and caught as one
            f"loss {name!r} is not usable: a loss is called as loss(logits, labels, *, class_weights, ignore_index, "
            "sample_weights) -> LossTerms(numerator, denominator) and has a method denominator(labels, *, "
            "class_weights, ignore_index, sample_weights) that is known before the forward; see "
            "trainer_ext.losses.contract.Loss"
        )
    return loss  # type: ignore[return-value]


@torch.no_grad()
def check_terms(loss: ConfiguredLoss, logits: Tensor, labels: Tensor, sample_weights: Tensor | None = None) -> None:
    """Hold a loss to the contract on one batch: two scalars, additive over rows, the denominator as announced.

    Raises:
        ValueError: It does not keep it; the message says in what.
    """

    def part(rows: slice) -> tuple[float, float]:
        weights = None if sample_weights is None else sample_weights[rows]
        found = loss(logits[rows], labels[rows], weights)
        if not (
            isinstance(found, tuple) and len(found) == 2 and all(torch.is_tensor(t) and t.ndim == 0 for t in found)
        ):
            raise ValueError(
                f"{name} returned {type(found).__name__}; it has to return LossTerms(numerator, denominator), two scalar "
                "tensors."
            )
        announced = loss.denominator(labels[rows], weights)
        if not (torch.is_tensor(announced) and announced.ndim == 0):
            raise ValueError(f"{name}.denominator() has to return one number, a scalar tensor.")
        if not abs(float(found[1]) - float(announced)) <= 1e-6 * max(1.0, abs(float(announced))):
            raise ValueError(
                f"{name} came with the denominator {float(found[1]):g}, and its denominator() says {float(announced):g} "
                "for the same labels: a step is divided by what denominator() says."
            )
        return float(found[0]), float(found[1])

    name = getattr(loss.loss, "__name__", type(loss.loss).__name__)
    cut = max(1, len(labels) // 3)
    whole, *parts = [part(rows) for rows in (slice(None), slice(0, cut), slice(cut, None))]
    for what, all_rows, first, rest in zip(("numerator", "denominator"), whole, *parts, strict=True):
        if not abs(all_rows - first - rest) <= 1e-4 * max(abs(all_rows), abs(first), abs(rest)):
            raise ValueError(
                f"{name} has no {what} that adds up over rows: {len(labels)} rows have {all_rows:g}, the first {cut} "
                f"{first:g} and the others {rest:g}. It has to be a sum over items, without a mean in it."
            )
