"""Has accelerate take gloo processes on a CPU for what they are: distributed.

`PartialState._prepare_backend` knows no accelerator here, and answers that there is nothing to distribute over;
`AcceleratorState` takes the FSDP plugin only of processes that it calls MULTI_GPU. Both are set right, in processes of
a rehearsal alone. Nothing of DeepSpeed or of FSDP2 itself is touched: their engines run on gloo as they are.
"""

import inspect
import os
from datetime import timedelta
from typing import Any

# Before torch is asked: a rehearsal stays off the GPUs of a machine that has some.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}

# What a CPU cannot do for a training argument, and what is rehearsed in its place.
NOT_ON_CPU: dict[str, tuple[Any, str]] = {
    "fp16": (False, "fp16 needs a GPU; float32 was rehearsed"),
    "fp16_full_eval": (False, "fp16_full_eval needs a GPU; float32 was rehearsed"),
    "tf32": (None, "tf32 needs a GPU; float32 was rehearsed"),
    "ddp_backend": (None, "the backend was gloo"),
    "dataloader_pin_memory": (False, ""),
}


def install() -> None:
    """Set accelerate right, in this process.

    Raises:
        RuntimeError: accelerate has changed where this reaches into it.
    """
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    own = getattr(PartialState, "_prepare_backend", None)
    if own is None or list(inspect.signature(own).parameters) != ["self", "cpu", "sagemaker_dp", "backend"]:
        raise RuntimeError(
            f"accelerate {accelerate.__version__} has no PartialState._prepare_backend(cpu, sagemaker_dp, backend) any "
            "more, by which a rehearsal has it run on the CPU. Rehearse with accelerate 1.15.0."
        )

    def prepare_backend(
        self: Any, cpu: bool = False, sagemaker_dp: Any = False, backend: Any = None
    ) -> tuple[Any, Any]:
        if "LOCAL_RANK" not in os.environ:
            return own(self, True, sagemaker_dp, backend)
        begin_gloo()
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        return "gloo", DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU

    PartialState._prepare_backend = prepare_backend


def begin_gloo() -> None:
    """The process group, as DeepSpeed or torch sets it up."""
    import torch

    if torch.distributed.is_initialized():
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    else:
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=10))


def adapt(args: Any) -> list[str]:
    """Set the arguments that a CPU cannot follow; returns what is not covered by that, in words.

    Args:
        args: `TrainingArguments` whose own checks have not run yet.
    """
    args.use_cpu = True
    if args.deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    missed = []
    for name, (value, said) in NOT_ON_CPU.items():
        if getattr(args, name) not in (None, False, value) and said:
            missed.append(said)
        setattr(args, name, value)
    return missed
