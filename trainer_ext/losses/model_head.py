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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Found:
    """What a head's loss turned out to be.

    Attributes:
        shifted: Labels of shape (B, T) are those of the next token: the first of a row is no target.
        divides: It is divided by `num_items_in_batch` where the head is told.
        whole: The labels and the loss of the probed rows.
        parts: The same of the rows cut in two.
    """

    shifted: bool
    divides: bool
    whole: tuple[float, float]
    parts: list[tuple[float, float]]

    @property
    def gap(self) -> float:
        """How far `n L` is from `n_a L_a + n_b L_b`, relative to the largest of the three."""
        whole, *parts = [n * loss if n else 0.0 for n, loss in (self.whole, *self.parts)]
        largest = max(map(abs, (whole, *parts)))
        return abs(whole - sum(parts)) / largest if largest else 0.0


@torch.no_grad()
def probe(
    model: nn.Module,
    mean: Callable[..., Tensor],
    denominator: Callable[[Mapping[str, Any], bool], Tensor],
    batch: Mapping[str, Any],
) -> Found:
    """Ask a head for its loss of a few rows, whole and cut in two, with first labels alone, and told of items.

    Small forwards in evaluation mode, as many on every rank; random generators, buffers and modes are left as they were.

    Args:
        model: Whose modes and buffers to keep.
        mean: The head's loss of a batch, and of further keywords.
        denominator: The labels that a head averages over, of a batch, and of whether it shifts them.
        batch: A batch; its first rows are used.
    """
    rows = min(PROBED_ROWS, next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim))
    cut = max(1, rows // 3)
    parts = [_rows(batch, slice(cut)), *([_rows(batch, slice(cut, rows))] if rows > 1 else [])]
    whole = _rows(batch, slice(rows))
    modes, buffers = [(m, m.training) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        model.eval()
        with torch.random.fork_rng(devices):
            shifted = _shifts(mean, whole)
            found = [(denominator(one, shifted).item(), mean(one).double().item()) for one in (whole, *parts)]
            items = torch.tensor(2 * max(1.0, found[0][0]), device=_device(whole))
            told, told_twice = (mean(whole, num_items_in_batch=n).double().item() for n in (items / 2, items))
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, kept in buffers:
            buffer.copy_(kept)
    divides = told != 0 and abs(told_twice - told / 2) <= 0.1 * abs(told / 2)
    return Found(shifted, divides, found[0], found[1:] if rows > 1 else found[:1])


def check_additive(found: Found, name: str, dtype: torch.dtype) -> None:
    """Hold what a probe found to `n L = n_a L_a + n_b L_b`.

    Args:
        found: By the probe.
        name: The head's.
        dtype: In which it computes.

    Raises:
        ValueError: The loss is no mean over the labels, so that it cannot be put together from micro-batches.
    """
    if not found.gap <= ADDITIVE.get(dtype, ADDITIVE_IN_HALF_PRECISION):
        (n, loss), (n_a, loss_a), (n_b, loss_b) = found.whole, *found.parts
        raise ValueError(
            f"{name}: its own loss is no mean over its labels: rows with {n:g} labels have the loss {loss:g}; cut in two, "
            f"{n_a:g} have {loss_a:g} and {n_b:g} have {loss_b:g}, and {n:g} x {loss:g} is not {n_a:g} x {loss_a:g} + "
            f"{n_b:g} x {loss_b:g}. A sum, a contrastive or an auxiliary loss cannot be put together from micro-batches. "
            "Give a loss of the logits (loss=), or a compute_loss of your own with loss_is_scaled_for_ga = False."
        )


def _shifts(mean: Callable[..., Tensor], batch: Mapping[str, Any]) -> bool:
    """Whether labels of nothing but the first position of each row leave a head without a target."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return False
    first = torch.full_like(labels, IGNORE_INDEX)
    first[:, 0] = labels.clamp(min=0).amax(1)  # a class that occurs, whatever stands at the first position
    loss = mean({**batch, "labels": first})
    return not (bool(loss.isfinite()) and loss.item() != 0)


def _device(batch: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in batch.values() if isinstance(value, Tensor))


def _rows(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    count = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in batch.items()
    }
