"""Floating-point operations: how many a stretch of code runs, and how many a device can run in a second.

Counted are matrix products, convolutions and attention, by PyTorch's own table of formulas
(`torch.utils.flop_counter`), a multiplication and an addition as two. Kernels that the table does not know, such as
those of the package flash-attn, count as 0.
"""

from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

SIZES = {"cpu": 1024}
SIZE = 4096  # of an accelerator's square matrices
REPEATS = 5


class FlopCounter(TorchDispatchMode):
    """Counts while it is entered. PyTorch's `FlopCounterMode` cannot be entered in the middle of a module's call.

    Attributes:
        flops: What was counted, of the forward and the backward pass alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", None)
        if operator in flop_registry:
            self.flops += flop_registry[operator](*args, **kwargs, out_val=out)
        elif operator in ATTENTION_ON_CPU:
            self.flops += ATTENTION_ON_CPU[operator](*(tensor.shape for tensor in args[: OPERANDS[operator]]))
        return out


# PyTorch's table has the attention kernels of accelerators only.
ATTENTION_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
}
OPERANDS: dict[Any, int] = dict(zip(ATTENTION_ON_CPU, (3, 4), strict=True))


def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The operations per second of the best of five square matrix products on `device` in `dtype`.

    With this process's threads and precision settings, beside whatever else runs; it draws from no global generator.
    """
    n = SIZES.get(device.type, SIZE)
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(n, n, device=device, generator=generator).to(dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(1 + REPEATS):  # the first one warms up
            _wait_for(device)
            began = perf_counter()
            matrix @ matrix
            _wait_for(device)
            best = min(best, perf_counter() - began)
    return 2 * n**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
