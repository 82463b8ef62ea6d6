"""Whether a step's gradient is finite on all ranks, and which parameter is the first that is not.

A model after its backward pass goes in. With ZeRO the engine itself leaves out such a step; here it is made sure of, and
the parameter is found before the engine clears its gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer_ext.engine import plain_name


@dataclass(frozen=True)
class BadGradient:
    """The first parameter, in the model's order, whose gradient is not finite.

    Attributes:
        parameter: Its name.
        count: Elements that are NaN or infinite.
        elements: All of its elements.
    """

    parameter: str
    count: int
    elements: int

    def __str__(self) -> str:
        return f"{self.parameter}, {self.count} of {self.elements} elements"


def gradient_norms(model: nn.Module) -> Tensor:
    """Shape (parameters with a gradient,): the norms of this rank's parts; one pass, nobody waits.

    Args:
        model: After its backward pass.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    norms = torch._foreach_norm([grad if grad.numel() else grad.new_zeros(1) for grad in local])
    return torch.stack([norm.float().to(norms[0].device) for norm in norms])


def names_of_gradients(model: nn.Module) -> list[str]:
    """The parameters that `gradient_norms` speaks of, in its order."""
    return [plain_name(name) for name, parameter in model.named_parameters() if parameter.grad is not None]


def first_bad_gradient(model: nn.Module, gradient_of: Callable[[nn.Parameter], Tensor | None]) -> BadGradient | None:
    """The first parameter that is not finite: a collective where gradients are sharded.

    Args:
        model: After its backward pass.
        gradient_of: The whole gradient of a parameter.
    """
    for name, parameter in model.named_parameters():
        gradient = gradient_of(parameter) if parameter.requires_grad else None
        if gradient is not None and (count := int((~torch.isfinite(gradient)).sum())):
            return BadGradient(plain_name(name), count, gradient.numel())
    return None


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient as it is, put together where FSDP2 has split it."""
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def watch_zero(zero: Any, found: Callable[[BadGradient | None], None], model: nn.Module) -> Callable[[], None]:
    """Have a ZeRO optimizer leave out each step whose gradient is not finite, and say which parameter was the first.

    It skips such steps by itself, as an overflow, but in ZeRO-1 and 2 with bf16 and `check_grad_overflow` off.

    Args:
        zero: DeepSpeed's optimizer.
        found: Told of the parameter, while the engine decides to leave the step out.
        model: The one whose parameters it has partitioned.

    Returns:
        What undoes it.
    """
    from deepspeed.utils import safe_get_full_grad

    if not getattr(zero, "check_grad_overflow", True) and (zero.dtype == torch.bfloat16 or not zero.compute_grad_norm):
        zero.check_grad_overflow = True
    own = getattr(zero, "_update_scale", None)
    if own is None:  # BF16_Optimizer, which has no loss scale
        return lambda: None

    def update_scale(overflow: bool = False) -> None:
        if overflow:
            found(first_bad_gradient(model, safe_get_full_grad))
        own(overflow)

    zero._update_scale = update_scale

    def undo() -> None:
        del zero._update_scale

    return undo
