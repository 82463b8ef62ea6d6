"""What a step's micro-batches came to, watched by hooks on the model: which rows are not finite, and when gradients are.

The model's outputs go in, forward and backward; for each micro-batch flags of its rows come out, kept on the device
until somebody asks. Nothing is kept of the outputs themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass
class Flags:
    """Of one step: by micro-batch, a sum over each row, shape (rows,), on the device: not finite where the row is not."""

    forward: list[tuple[int, Tensor]] = field(default_factory=list)
    backward: list[tuple[int, Tensor]] = field(default_factory=list)
    losses: list[tuple[int, Tensor]] = field(default_factory=list)

    def were_seen(self) -> bool:
        """Whether the model returned tensors to watch."""
        return bool(self.forward or self.losses)

    def not_finite(self) -> dict[int, list[int]]:
        """The micro-batches (from 0) with rows that are not finite, and these rows (from 0).

        Those of the outputs. Where all of them are finite: the micro-batches whose loss is not, with no rows; or those
        of the gradient with respect to the outputs, of a loss that is computed outside of the model.
        """
        return _rows(self.forward) or {number: [] for number in _rows(self.losses)} or _rows(self.backward)


class MicroBatches:
    """Hooks on a model in training.

    Args:
        model: The one that is called with the batches, below DDP or DeepSpeed; with FSDP2 the sharded one.
        after_backward: Called at the end of each backward pass, when gradients are accumulated and reduced (DDP and
            FSDP2). None for an engine that steps by what it sees in the gradients: there a loss that is not finite gets
            a gradient that is not finite either, on this rank and so, after the reduction, on all.

    Attributes:
        calls_back: Whether `after_backward` is wanted; to be set between steps.
    """

    def __init__(self, model: nn.Module, after_backward: Callable[[], None] | None) -> None:
        self.calls_back = True
        self._after_backward = after_backward
        self._hook = model.register_forward_hook(torch.compiler.disable(self._after_forward))
        self.begin_step()

    def begin_step(self) -> None:
        """The next forward pass is of a step's first micro-batch."""
        self.flags = Flags()
        self._number = 0
        self._queued = False

    def begin_micro_batch(self) -> None:
        """The next forward pass is of the next micro-batch."""
        self._number += 1
        self._queued = False

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hook.remove()

    def a_loss_is_not_finite(self) -> Tensor | None:
        """Shape (): whether a loss that the model computed and the step used is not finite, without a look at it; None
        where the model computed none."""
        losses = [used for _, used in self.flags.losses]
        return ~torch.cat(losses).isfinite().all() if losses else None

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss, others = _tensors(output)
        if loss is not None:
            loss.register_hook(self._judge(loss.detach()))
        for tensor in others:
            self.flags.forward.append((self._number, _sums(tensor.detach())))
            tensor.register_hook(self._keep_gradient)

    def _judge(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """A hook that is called if the step uses this loss; one whose gradient is 0 is left out of it, as where a
        micro-batch has no label that counts and the head's mean over none is NaN."""

        def judge(gradient: Tensor) -> Tensor:
            self._backward_begins()
            used = torch.where(gradient == 0, 0, loss).reshape(1)
            self.flags.losses.append((self._number, used))
            return (
                gradient if self._after_backward is not None else gradient.masked_fill(~used[0].isfinite(), torch.nan)
            )

        return judge

    def _keep_gradient(self, gradient: Tensor | None) -> None:
        self._backward_begins()
        if gradient is not None:  # below a compiled model's graph it may be none
            self.flags.backward.append((self._number, _sums(gradient)))

    def _backward_begins(self) -> None:
        if self.calls_back and not self._queued and self._after_backward is not None:
            self._queued = True
            _at_the_end_of_backward(lambda: _at_the_end_of_backward(cast(Callable[[], None], self._after_backward)))


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Called twice, one inside the other, `call` comes after what DDP and FSDP2 put there to finish their reductions."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _tensors(output: Any) -> tuple[Tensor | None, list[Tensor]]:
    """The loss of a model's output and its logits, or what else it has a gradient for."""
    named = dict(output.items()) if hasattr(output, "items") else None
    values = (
        list(named.values()) if named is not None else list(output) if isinstance(output, (list, tuple)) else [output]
    )
    differentiable = [v for v in values if isinstance(v, Tensor) and v.requires_grad and v.is_floating_point()]
    loss = next((v for v in differentiable if v.ndim == 0), None)
    others = [v for v in differentiable if v.ndim > 0]
    if named is not None and any(v is named.get("logits") for v in others):
        others = [named["logits"]]
    return loss, others


def _sums(values: Tensor) -> Tensor:
    """Shape (rows,): the sum of each row of `values`, shape (rows, ..), which is not finite if one of its elements is not.

    It needs no copy of the logits, as a test of each element does.
    """
    wide = values.dtype if values.dtype.itemsize >= 4 else torch.float32
    return values.flatten(1).sum(dim=1, dtype=wide) if values.ndim > 1 else values.to(wide, copy=True)


def _rows(flags: list[tuple[int, Tensor]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for number, sums in flags:
        rows = (~sums.isfinite()).nonzero().flatten().tolist()
        if rows:
            found[number] = sorted({*found.get(number, []), *rows})
    return found
