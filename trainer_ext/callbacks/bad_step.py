"""What is said of a step whose loss or gradient is not finite: the first parameter, the ranks, and their samples."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.drawn_rows import rows_of_batch
from trainer_ext.callbacks.micro_batches import Flags

NONE = "none, each element is finite"


@dataclass(frozen=True)
class Seen:
    """A step, as it was before the optimizer's.

    Attributes:
        step: Its number, from 1.
        epoch: At its beginning.
        flags: Of its micro-batches on this rank.
        first: The first bad parameter in words; or the names of all with a gradient, and its norms, shape (names,).
        bad: Shape (), 1 where it is bad on any rank.
    """

    step: int
    epoch: float
    flags: Flags
    first: str | tuple[list[str], Tensor]
    bad: Tensor = field(default_factory=lambda: torch.ones(()))


def describe(
    args: TrainingArguments, seen: Seen, loader: Any, began_in: float | None, *, since: int = 0, in_a_row: int = 1
) -> str:
    """What is known of a bad step on all ranks: a collective.

    Args:
        args: Of the training.
        seen: The step.
        loader: The training's.
        began_in: The epoch in whose middle a resume began, of which the order is not known.
        since: Steps that were begun after it.
        in_a_row: Bad steps up to this one.
    """
    own = _samples(args, seen.epoch, loader, seen.flags.not_finite(), began_in)
    where = "; ".join(part for part in of_all_ranks(own) if part)
    if not where and seen.flags.were_seen():
        where = "All outputs of the model are finite: it came about in the backward pass"
    elif not where:
        where = "The model's outputs hold no tensor that could be watched"
    after = f", nor of the {since} after it" if since else ""
    done = f"Nothing of it was applied{after}: weights and optimizer state are those before it."
    row = f" It is number {in_a_row} in a row." if in_a_row > 1 else ""
    return (
        f"NonFiniteGuard: the loss or gradient of step {seen.step} is not finite. {done}{row} "
        f"First parameter: {_first(seen)}. {where}."
    )


def _first(seen: Seen) -> str:
    if isinstance(seen.first, str):
        return seen.first
    names, norms = seen.first
    which = (~norms.isfinite()).nonzero().flatten().tolist()
    return names[which[0]] if which else NONE


def _samples(
    args: TrainingArguments, epoch: float, loader: Any, found: dict[int, list[int]], began_in: float | None
) -> str:
    """This rank's micro-batches that are not finite, in words; empty if all of them are."""
    parts = []
    for number, rows in sorted(found.items()):
        part = f"micro-batch {number + 1} of {args.gradient_accumulation_steps}"
        if hasattr(loader, "__len__"):
            batch = round((epoch % 1) * len(loader)) + number
            drawn = rows_of_batch(loader, int(epoch), batch) if epoch // 1 != began_in else None
            part += f" (batch {batch} of epoch {int(epoch)}, from 0)"
            if drawn is not None:
                chosen = [drawn[row] for row in rows if row < len(drawn)] or drawn
                part += f", rows {', '.join(map(str, chosen))} of the dataset"
        if rows:
            part += f", {', '.join(map(str, rows))} in the batch"
        parts.append(part)
    return f"rank {args.process_index}: {'; '.join(parts)}" if parts else ""
