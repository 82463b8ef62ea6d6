"""Metrics of batches as they come, so that an evaluation gathers and keeps no logits that no metric needs.

Logits and labels of a batch go in. Where counts are enough, 3 C + 3 whole numbers stay on the device, no batch waits for
it, and the ranks add them up once. Metrics of the scores need every row: the rows that count, without padding, go to the
host's memory.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer_ext.metrics.counts import Counts
from trainer_ext.metrics.predictions import IGNORED, check_shapes

if TYPE_CHECKING:
    from trainer_ext.metrics.for_trainer import ComputeMetrics


class RunningMetrics:
    """What `compute` needs of the batches so far."""

    def __init__(self, compute: "ComputeMetrics") -> None:
        self._compute = compute
        self._num_labels = len(compute.label_names)
        self._counts: Tensor | None = None
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch, as `Predictions.of` takes it.

        Raises:
            ValueError: The shapes do not fit each other.
        """
        C, several = self._num_labels, self._compute.multi_label
        check_shapes(tuple(logits.shape), tuple(labels.shape), C, several)
        logits, labels = logits.reshape(-1, C), labels.reshape(-1, C) if several else labels.reshape(-1)
        if self._compute.needs_rows:
            kept = slice(None) if several else labels != IGNORED
            values = logits[kept].cpu()
            exact = values.float() if values.dtype == torch.bfloat16 else values
            self._rows.append((exact.numpy(), labels[kept].cpu().numpy()))
            return
        counted = _count_labels(logits, labels) if several else _count_classes(logits, labels)
        self._counts = counted if self._counts is None else self._counts + counted

    def result(
        self, sum_over_ranks: Callable[[Tensor], Tensor], gather: Callable[[Any], list[Any]]
    ) -> dict[str, float]:
        """The metrics of all ranks' batches.

        Args:
            sum_over_ranks: The sum of a tensor over the ranks.
            gather: One list of all ranks' lists.

        Raises:
            ValueError: A label is none of the classes.
        """
        C, several = self._num_labels, self._compute.multi_label
        if self._compute.needs_rows:
            rows = gather(self._rows)
            return self._compute.of(*(np.concatenate(parts) for parts in zip(*rows, strict=True))) if rows else {}
        if self._counts is None:
            return {}
        numbers = sum_over_ranks(self._counts).cpu().numpy()
        true, guessed, hits = numbers[3:].reshape(3, C)
        if wrong := int(numbers[2]):
            raise ValueError(f"{wrong} labels are none of 0 to {1 if several else C - 1}.")
        return self._compute.of_counts(Counts(int(numbers[0]), int(numbers[1]), true, guessed, hits, several))


def _count_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows, right ones and wrong labels; then true, guessed and hits of each class: (3 + 3 C,), int64."""
    C = logits.shape[-1]
    guess, counted, label = logits.argmax(-1), labels != IGNORED, labels.clamp(0, C - 1).long()
    right = counted & (guess == labels)
    true, guessed, hits = (
        counted.new_zeros(C, dtype=torch.int64).scatter_add_(0, index, which.long())
        for index, which in ((label, counted), (guess, counted), (label, right))
    )
    one = torch.stack([counted.sum(), right.sum(), (counted & (labels != label)).sum()])
    return torch.cat([one, true, guessed, hits])


def _count_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of multi-hot labels."""
    guess, true = logits >= 0, labels == 1
    wrong = (~true & (labels != 0)).sum()
    one = torch.stack([wrong.new_tensor(len(labels)), (guess == true).all(-1).sum(), wrong])
    return torch.cat([one, true.sum(0), guess.sum(0), (guess & true).sum(0)])
