"""Focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002), over the softmax of C classes.

With `p_i = softmax(logits_i)[y_i]`, the probability of the right class without any weight in it:

    l_i          = (1 - p_i)^gamma * -log p_i
    numerator    = sum_i w[y_i] l_i
    denominator  = sum_i w[y_i]

over items whose label is not ignored. The paper's alpha is the class weight `w`; with `gamma=0` this is weighted
cross-entropy.
"""

import math

import torch
from torch import Tensor

from trainer_ext.losses.contract import IGNORE_INDEX, ClassLoss, LossTerms, check_shapes, full_precision, item_weights


class Focal(ClassLoss):
    """Cross-entropy whose well-classified items count less."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
        gamma: float = 2.0,
    ) -> LossTerms:
        """The two sums over one micro-batch; shapes and dtypes as `CrossEntropy`.

        Args:
            logits: Shape (..., C).
            labels: Shape (...), int64 in 0..C-1, or `ignore_index`.
            class_weights: Shape (C,), or None.
            ignore_index: The label that does not count.
            sample_weights: Shape (B,) or that of `labels`, or None.
            gamma: 0 or more; how fast items fade as they are classified well.

        Raises:
            ValueError: `gamma` is negative, or there is not one label for every item.
        """
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma={gamma}: the focal loss takes a number from 0.")
        check_shapes(logits, labels, class_weights)
        logits = full_precision(logits)
        kept = labels != ignore_index
        right = labels.masked_fill(~kept, 0).unsqueeze(-1)
        whole = logits.logsumexp(-1)
        log_p = logits.gather(-1, right).squeeze(-1) - whole
        # log(1 - p) from the other classes: 1 - p itself is 0 where p rounds to 1, and its power has no gradient there.
        log_rest = logits.scatter(-1, right, -torch.inf).logsumexp(-1) - whole
        losses = torch.exp(gamma * log_rest) * -log_p if gamma else -log_p  # 0 times an infinite log is no number
        weights = item_weights(labels, class_weights, ignore_index, sample_weights)
        numerator = torch.sum(losses.masked_fill(~kept, 0) * weights.to(losses.dtype))
        return LossTerms(numerator, weights.sum())


focal = Focal()
