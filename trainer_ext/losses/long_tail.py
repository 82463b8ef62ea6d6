"""Losses for classes of unequal frequency, which move the logits by what the class counts `n` say.

Logit adjustment (Menon et al. 2021, https://arxiv.org/abs/2007.07314), with the prior `pi[c] = n[c] / sum n`:

    cross-entropy of  logits + tau log pi

`tau=1` is the balanced softmax (Ren et al. 2020, https://arxiv.org/abs/2007.10740).

LDAM, the label-distribution-aware margin (Cao et al. 2019, https://arxiv.org/abs/1906.07413), with
`m[c] = max_margin (min n / n[c])^(1/4)`, so that the rarest class has the whole margin:

    cross-entropy of  scale (logits - m[y] at the right class)

Both act in training and in `eval_loss`; predictions are taken from the logits as they are. The paper's deferred
re-weighting is `reweight_after`, an option of the trainer for every loss.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_ext.losses.contract import IGNORE_INDEX, ClassLoss, LossTerms, check_shapes, full_precision
from trainer_ext.losses.cross_entropy import cross_entropy


class LogitAdjusted(ClassLoss):
    """Cross-entropy of logits to which the log of the class prior is added."""

    needs_class_counts = True

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_counts: Sequence[float] | Tensor | None = None,
        tau: float = 1.0,
        **options: Any,
    ) -> LossTerms:
        """The two sums over one micro-batch; shapes, dtypes and further options as `CrossEntropy`.

        Args:
            logits: Shape (..., C).
            labels: Shape (...), int64.
            class_counts: Shape (C,): how often each class occurs in training, or its prior; a trainer counts them.
            tau: 0 leaves the logits as they are.

        Raises:
            ValueError: There are no counts, one is 0 or less, their number is not C, or `tau` is not finite.
        """
        if not math.isfinite(tau):
            raise ValueError(f"tau={tau}: logit adjustment takes a finite number.")
        logits = full_precision(logits)
        counts = _checked(class_counts, logits)
        return cross_entropy(logits + tau * (counts / counts.sum()).log().to(logits.dtype), labels, **options)


class Ldam(ClassLoss):
    """Cross-entropy with a margin that is larger for rarer classes."""

    needs_class_counts = True

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_counts: Sequence[float] | Tensor | None = None,
        max_margin: float = 0.5,
        scale: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
        **options: Any,
    ) -> LossTerms:
        """The two sums over one micro-batch; shapes, dtypes and further options as `CrossEntropy`.

        Args:
            logits: Shape (..., C).
            labels: Shape (...), int64.
            class_counts: Shape (C,): how often each class occurs in training, or its prior; a trainer counts them.
            max_margin: The margin of the rarest class; 0 is cross-entropy.
            scale: What logits are multiplied by. The paper's 30 is for logits that are cosines; a linear head learns
                its own scale.
            ignore_index: The label that does not count.

        Raises:
            ValueError: There are no counts, one is 0 or less, their number is not C, `scale` is not positive, or there is
                not one label for every item.
        """
        if not (0 < scale < math.inf and 0 <= max_margin < math.inf):
            raise ValueError(
                f"scale={scale}, max_margin={max_margin}: LDAM takes a scale above 0 and a margin from 0."
            )
        check_shapes(logits, labels)
        logits = full_precision(logits)
        counts = _checked(class_counts, logits)
        margins = (max_margin * (counts.min() / counts) ** 0.25).to(logits.dtype)
        right = F.one_hot(labels.masked_fill(labels == ignore_index, 0), logits.shape[-1]).to(logits.dtype)
        return cross_entropy(scale * (logits - right * margins), labels, ignore_index=ignore_index, **options)


def _checked(class_counts: Sequence[float] | Tensor | None, logits: Tensor) -> Tensor:
    if class_counts is None:
        raise ValueError(
            f"the loss needs class_counts: how often each of the {logits.shape[-1]} classes occurs in training."
        )
    counts = torch.as_tensor(class_counts, dtype=torch.float64).to(logits.device)
    if counts.shape != logits.shape[-1:] or not (counts > 0).all() or not counts.isfinite().all():
        raise ValueError(
            f"class_counts={counts.tolist()}: the loss needs one finite number above 0 for each of the "
            f"{logits.shape[-1]} classes, how often it occurs in training."
        )
    return counts


logit_adjusted, ldam = LogitAdjusted(), Ldam()
