"""The loss that a model's own head computes, brought under the contract.

A head's loss is a mean over the labels that count in its micro-batch. It is asked for that mean (it is never
told `num_items_in_batch`, which some heads honour and others swallow), and the mean is turned back into the
sum that it came from:

    denominator = n, the number of labels that are not ignored
    numerator   = n * mean

Whether a head's loss is such a mean is found out by `probe` before the first step: of a batch cut in two,

    n L = n_a L_a + n_b L_b

Answers of two ends (extractive question answering) are computed from the head's logits, 2 B items a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_ext.losses.contract import IGNORE_INDEX, LossTerms, exact_dtype, full_precision

PROBED_ROWS = 8
# What rounding leaves of the equation, relative; a mean over something else is off by far more.
ADDITIVE = {torch.float64: 1e-9, torch.float32: 1e-4}
ADDITIVE_IN_HALF_PRECISION = 0.05


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


def head_terms(mean: Tensor, denominator: Tensor) -> LossTerms:
    """The two sums behind a head's mean loss; a head that saw no label gave NaN, which counts as 0."""
    mean = full_precision(mean)
    numerator = torch.where(denominator == 0, 0.0, mean) * denominator.to(mean.dtype)
    return LossTerms(numerator, denominator)


def answer_denominator(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """Scalar: how many of the 2 B ends of answers, shape (B,) each, lie within the `length` tokens."""
    return (torch.cat([starts.flatten(), ends.flatten()]) < length).sum().to(exact_dtype(starts.device))


def answer_terms(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> LossTerms:
    """Cross-entropy of both ends of each answer over the T positions, logits of shape (B, T).

    As transformers' heads: a position from T on does not count, one below 0 is 0. They average starts and ends apart,
    which is the same where as many of both count.
    """
    logits = full_precision(torch.cat([start_logits, end_logits]))
    length = logits.shape[-1]
    targets = torch.cat([starts.flatten(), ends.flatten()]).clamp(0, length)
    numerator = F.cross_entropy(logits, targets, ignore_index=length, reduction="sum")
    return LossTerms(numerator, answer_denominator(starts, ends, length))


@torch.no_grad()
def probe(
    model: nn.Module,
    mean: Callable[..., Tensor],
    denominator: Callable[[Mapping[str, Any]], Tensor],
    batch: Mapping[str, Any],
    *,
    half_precision: bool = False,
) -> bool:
    """Find out whether a head's loss is a mean over its labels, and whether it divides by `num_items_in_batch`.

    Six small forwards in evaluation mode, as many on every rank; random generators, buffers and modes are left as they
    were.

    Args:
        model: Whose modes and buffers to keep.
        mean: The head's loss of a batch, and of further keywords.
        denominator: The labels that it is taken to average over.
        batch: A batch; its first rows are used.
        half_precision: Whether the forward computes in half precision.

    Returns:
        Whether the head divides by `num_items_in_batch` where it is told.

    Raises:
        ValueError: The loss is no mean over the labels, so that it cannot be put together from micro-batches.
    """
    rows = min(PROBED_ROWS, next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim))
    cut = max(1, rows // 3)
    whole, *parts = [_rows(batch, part) for part in (slice(rows), slice(cut), slice(cut if rows > 1 else 0, rows))]
    modes, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        model.eval()
        with torch.random.fork_rng(devices):
            found = [(denominator(one).item(), mean(one).double().item()) for one in (whole, *parts)]
            items = torch.tensor(2 * max(1.0, found[0][0]), device=whole_device(whole))
            told, told_twice = (mean(whole, num_items_in_batch=n).double().item() for n in (items / 2, items))
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    sums = [n * loss if n else 0.0 for n, loss in found]
    gap = abs(sums[0] - sums[1] - sums[2]) if rows > 1 else 0.0
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    allowed = ADDITIVE_IN_HALF_PRECISION if half_precision else ADDITIVE.get(dtype, ADDITIVE_IN_HALF_PRECISION)
    if not gap <= allowed * max(abs(value) for value in sums):
        (n, whole_loss), (n_a, loss_a), (n_b, loss_b) = found
        raise ValueError(
            f"{type(model).__name__}: its own loss is no mean over its labels: {rows} rows with {n:g} labels have the loss "
            f"{whole_loss:g}; cut in two, {n_a:g} have {loss_a:g} and {n_b:g} have {loss_b:g}, and {n:g} x {whole_loss:g} "
            f"is not {n_a:g} x {loss_a:g} + {n_b:g} x {loss_b:g}. A sum, a contrastive or an auxiliary loss cannot be put "
            "together from micro-batches. Give a loss of the logits (loss=), or a compute_loss of your own with "
            "loss_is_scaled_for_ga = False."
        )
    return abs(told_twice - told / 2) <= 0.1 * abs(told / 2) and told != 0


def whole_device(batch: Mapping[str, Any]) -> torch.device:
    """Where a batch's tensors are."""
    return next(value.device for value in batch.values() if isinstance(value, Tensor))


def _rows(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    count = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in batch.items()
    }
