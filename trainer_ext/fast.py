"""The fast profile: defaults that make a training faster and leave its rows, its steps and its loss as they are.

`fast_profile()` gives them as arguments, for this machine; `--profile fast` makes them the defaults of the command line.
docs/fast.md says what each does.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import is_torch_tf32_available

from trainer_ext.attention import AUTO
from trainer_ext.heap import can_keep_freed_memory

logger = logging.getLogger(__name__)

NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, then of ARM, as torch.cpu names them


def fast_profile(**own: Any) -> dict[str, Any]:
    """Arguments of `CustomTrainingArguments` that make it fast here.

        args = CustomTrainingArguments("out", **fast_profile(learning_rate=3e-5))

    Args:
        own: Further arguments, which win. `use_cpu` says that a GPU is not to be used.
    """
    gpu = torch.cuda.is_available() and not own.get("use_cpu")
    bf16 = has_bf16(gpu=gpu)
    if not bf16 and "bf16" not in own:
        logger.warning("The fast profile is without bf16, which this %s does not compute natively.", _kind(gpu))
    orders = {"train_sampling_strategy": "group_by_length", "sort_eval_by_length": True}
    settings = {**orders, "optim": "adamw_torch_fused", "bf16": bf16}
    return {**settings, **(_of_gpu() if gpu else _of_cpu()), **own}


def has_bf16(*, gpu: bool) -> bool:
    """Whether products in bfloat16 are computed by the hardware, which is when they are faster than in float32."""
    if gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = cpu_capabilities()
    return any(capabilities.get(name) for name in NATIVE_BF16)


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of this CPU; nothing where this torch has no `get_capabilities` yet."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _of_gpu() -> dict[str, Any]:
    """From the documentation of PyTorch and transformers; not measured."""
    return {"tf32": is_torch_tf32_available(), "torch_compile": True, "dataloader_pin_memory": True}


def _of_cpu() -> dict[str, Any]:
    return {
        "attn_implementation": AUTO,
        "divide_cores": hasattr(os, "sched_setaffinity"),
        "keep_freed_memory": can_keep_freed_memory(),
    }


def _kind(gpu: bool) -> str:
    return "GPU" if gpu else "CPU"


PROFILES = {"fast": fast_profile}
