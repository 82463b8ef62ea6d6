"""Losses of every element by itself: several labels an item, and regression.

With targets `t` in the shape of the logits `x`, and element losses `l`:

    numerator    = sum v l(x, t)
    denominator  = the number of elements

which is PyTorch's mean reduction. A sample's weight, where samples have one, multiplies both. `v` is the class weight
of the element's column, for several labels only; as `weight` of `BCEWithLogitsLoss` it leaves the denominator alone.

    bce         -pos_weight t log s(x) - (1 - t) log(1 - s(x)),  s the sigmoid; an element of -100 does not count
    asymmetric  -t (1 - p)^gamma_pos log p - (1 - t) q^gamma_neg log(1 - q),  p = s(x), q = max(p - clip, 0)
                (Ridnik et al. 2021, https://arxiv.org/abs/2009.14119)
    mse         (x - t)^2
    huber       (x - t)^2 / 2 where |x - t| <= delta, else delta (|x - t| - delta / 2)  (Huber 1964)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_ext.losses.contract import IGNORE_INDEX, LossTerms, exact_dtype, full_precision, of_samples


class ElementLoss(ABC):
    """What the four have in common; a subclass gives `elements`."""

    is_classification = True  # columns are labels: they may have weights, and -100 stands for no label

    @abstractmethod
    def elements(self, *args: Any, **options: Any) -> Tensor:
        """The loss of every element, in the one shape of the logits and the targets."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
        **options: Any,
    ) -> LossTerms:
        """The two sums over one micro-batch.

        Args:
            logits: Shape (B, ..., C), floating; half precision is raised to float32.
            labels: The same shape, floating or integer; (B, ...) where C is 1.
            class_weights: Shape (C,), of the labels of `bce` and `asymmetric`.
            ignore_index: The label of `bce` and `asymmetric` that does not count. In regression, every number counts.
            sample_weights: Shape (B,), or None for 1 each.

        Raises:
            ValueError: The shapes do not fit, class weights are not one a label, or regression is given some.
        """
        logits = full_precision(logits)
        if labels.shape != logits.shape and (*labels.shape, 1) != logits.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}: the loss needs one "
                "for every element. The model has num_labels outputs an item."
            )
        weights = self._weights(labels, ignore_index, sample_weights).reshape(logits.shape)
        targets = labels.reshape(logits.shape).to(logits.dtype).masked_fill(weights == 0, 0)
        losses = self.elements(logits, targets, **options).masked_fill(weights == 0, 0)
        if class_weights is not None:
            if not self.is_classification:
                raise ValueError("class_weights: regression has no classes. Give samples weights of their own.")
            if class_weights.shape != logits.shape[-1:]:
                raise ValueError(
                    f"class_weights={class_weights.tolist()}: the loss takes one for each of the {logits.shape[-1]} labels."
                )
            losses = losses * class_weights.to(losses)
        return LossTerms(torch.sum(losses * weights.to(losses.dtype)), weights.sum())

    def denominator(
        self,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Scalar, float64 where the device has it: the number of elements that count."""
        return self._weights(labels, ignore_index, sample_weights).sum()

    def _weights(self, labels: Tensor, ignore_index: int, sample_weights: Tensor | None) -> Tensor:
        dtype = exact_dtype(labels.device)
        kept = labels != ignore_index if self.is_classification else torch.ones_like(labels, dtype=torch.bool)
        weights = kept.to(dtype)
        if sample_weights is None:
            return weights
        return weights * of_samples(sample_weights, labels, dtype)


class Bce(ElementLoss):
    """Binary cross-entropy of each label: `torch.nn.BCEWithLogitsLoss`."""

    def elements(
        self, logits: Tensor, targets: Tensor, *, pos_weight: float | Sequence[float] | Tensor | None = None
    ) -> Tensor:
        """`pos_weight`, one number or shape (C,), multiplies the loss of labels that are 1."""
        if pos_weight is not None:
            pos_weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
            fits = pos_weight.ndim <= 1 and pos_weight.numel() in (1, logits.shape[-1])
            if not fits or not (pos_weight > 0).all() or not pos_weight.isfinite().all():
                raise ValueError(
                    f"pos_weight={pos_weight.tolist()}: give one finite number above 0, or one for each of the "
                    f"{logits.shape[-1]} labels."
                )
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=pos_weight)


class Asymmetric(ElementLoss):
    """Binary cross-entropy that fades easy negatives, the many labels that an item does not have."""

    def elements(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
    ) -> Tensor:
        """The paper's options and the defaults of its code; all three 0 is binary cross-entropy."""
        if not (0 <= gamma_neg < math.inf and 0 <= gamma_pos < math.inf and 0 <= clip < 1):
            raise ValueError(
                f"gamma_neg={gamma_neg}, gamma_pos={gamma_pos}, clip={clip}: both gammas are numbers from 0, and "
                "0 <= clip < 1."
            )
        positive = torch.exp(gamma_pos * F.logsigmoid(-logits)) * -F.logsigmoid(logits)
        if clip == 0:
            negative = torch.exp(gamma_neg * F.logsigmoid(logits)) * -F.logsigmoid(-logits)
        else:
            probability = torch.sigmoid(logits) - clip
            # Where it is clipped the loss is 0; a power of 0 would have no gradient there.
            shifted = torch.where(probability > 0, probability, 0.5)
            rest = torch.log(torch.sigmoid(-logits) + clip)  # log(1 - shifted), which for a tiny clip would be log 0
            negative = torch.where(probability > 0, shifted**gamma_neg * -rest, 0.0)
        return targets * positive + (1 - targets) * negative


class Mse(ElementLoss):
    """The squared error: `torch.nn.MSELoss`."""

    is_classification = False

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits, targets, reduction="none")


class Huber(ElementLoss):
    """Squared near the target, absolute beyond `delta`: `torch.nn.HuberLoss`."""

    is_classification = False

    def elements(self, logits: Tensor, targets: Tensor, *, delta: float = 1.0) -> Tensor:
        """`delta`, above 0: the distance from which errors count by their size instead of its square."""
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta}: the Huber loss takes a number above 0.")
        return F.huber_loss(logits, targets, reduction="none", delta=delta)


bce, asymmetric, mse, huber = Bce(), Asymmetric(), Mse(), Huber()
