"""Cross-entropy with class weights, label smoothing and an ignored label.

With `p_i = softmax(logits_i)`, class weights `w` and labels `y`:

    l_i          = -log p_i[y_i]
    numerator    = sum_i w[y_i] l_i
    denominator  = sum_i w[y_i]

over items whose label is not ignored; their ratio is `torch.nn.CrossEntropyLoss(weight=w)` over the same
items. With `label_smoothing=e` (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567) the numerator is
PyTorch's: `(1 - e) w[y_i] l_i - e / C sum_c w[c] log p_i[c]`, the denominator is unchanged.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_ext.losses.contract import IGNORE_INDEX, ClassLoss, LossTerms, check_shapes, full_precision, item_weights


class CrossEntropy(ClassLoss):
    """Weighted cross-entropy for one label an item: sequences, tokens, images."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        sample_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> LossTerms:
        """The two sums over one micro-batch.

        Args:
            logits: Shape (..., C), floating; half precision is raised to float32.
            labels: Shape (...), int64 class indices in 0..C-1, or `ignore_index`.
            class_weights: Shape (C,), or None for 1 each.
            ignore_index: The label that does not count.
            sample_weights: Shape (B,) or that of `labels`, or None for 1 each.
            label_smoothing: In [0, 1].

        Returns:
            Two scalars, the numerator in the dtype of the logits (float32 at least).
        """
        if labels.shape != (*logits.shape[:-1], 1):
            check_shapes(logits, labels, class_weights)
        logits = full_precision(logits)
        options: dict[str, Any] = {
            "weight": None if class_weights is None else class_weights.to(logits.device, logits.dtype),
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        flat_logits, flat_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        if sample_weights is None:
            numerator = F.cross_entropy(flat_logits, flat_labels, reduction="sum", **options)
        else:
            losses = F.cross_entropy(flat_logits, flat_labels, reduction="none", **options)
            per_item = item_weights(labels, None, ignore_index, sample_weights).reshape(-1)
            numerator = torch.sum(losses * per_item.to(losses.dtype))
        denominator = self.denominator(
            labels, class_weights=class_weights, ignore_index=ignore_index, sample_weights=sample_weights
        )
        return LossTerms(numerator, denominator)


cross_entropy = CrossEntropy()
