"""The loss that a model's own head computes, brought under the contract.

A head's loss is a mean over the labels that count in its micro-batch. It is asked for that mean (it is never
told `num_items_in_batch`, which some heads honour and others swallow), and the mean is turned back into the
sum that it came from:

    denominator = n, the number of labels that are not ignored
    numerator   = n * mean
"""

import torch
from torch import Tensor

from trainer_ext.losses.contract import IGNORE_INDEX, LossTerms, exact_dtype, full_precision


def head_denominator(labels: Tensor, *, shifted: bool) -> Tensor:
    """Scalar: how many labels a head averages over: those that are not -100, all of them where they are floating.

    Args:
        labels: Any shape, integer or floating.
        shifted: The head predicts position t+1 from position t (causal language models), so the first
            label of each row is never a target.
    """
    if labels.is_floating_point():  # regression and multi-label heads ignore nothing
        return torch.tensor(labels.numel(), dtype=exact_dtype(labels.device), device=labels.device)
    targets = labels[..., 1:] if shifted else labels
    return (targets != IGNORE_INDEX).sum().to(exact_dtype(labels.device))


def head_terms(mean: Tensor, labels: Tensor, *, shifted: bool) -> LossTerms:
    """The two sums behind a head's mean loss; a head that saw no label gave NaN, which counts as 0."""
    denominator = head_denominator(labels, shifted=shifted)
    mean = full_precision(mean)
    numerator = torch.where(denominator == 0, 0.0, mean) * denominator.to(mean.dtype)
    return LossTerms(numerator, denominator)
