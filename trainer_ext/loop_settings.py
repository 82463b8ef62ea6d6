"""What the plain loops are told: their settings, and the same settings read from `TrainingArguments`.

What `TrainingArguments` ask for and the loops do not implement gets a clear no.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class LoopSettings:
    """What the loop is told; the defaults are those of `TrainingArguments`.

    Attributes:
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        max_steps: Optimizer steps; where it is 0 or less, `epochs` decides.
        warmup_steps: Optimizer steps; a value below 1 is a share of all steps.
        max_grad_norm: Where the gradient's norm is clipped; 0 or less for never.
        evaluate_each_epoch: Whether to evaluate after every epoch, or after the last step only.
        layerwise_lr_decay: The rate of each layer as a multiple of that of the layer above; the head's is 1.
        head_lr_multiplier: What the head's rate is multiplied by besides.
        muon: Whether Muon takes the matrices of the layers, as `MuonWithAdamW`; `fused` is of AdamW alone.
        divide_by: `"weights"`, the sum of the weights, or `"items"`, the number of labels.
    """

    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    accumulation: int = 1
    eval_batch_size: int = 8
    evaluate_each_epoch: bool = True
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    fused: bool = True
    layerwise_lr_decay: float = 1.0
    head_lr_multiplier: float = 1.0
    muon: bool = False
    warmup_steps: float = 0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    divide_by: str = "weights"
    seed: int = 42
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def clip_at(self) -> float:
        """The norm above which the gradient is scaled down; infinite for never."""
        return self.max_grad_norm if self.max_grad_norm > 0 else math.inf

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole run over a dataset of `rows` rows."""
        micro_batches = math.ceil(rows / self.batch_size)
        steps = math.ceil(self.epochs * math.ceil(micro_batches / self.accumulation))
        if rows == 0 or (self.max_steps <= 0 and steps <= 0):
            raise ValueError(f"{rows} rows, {self.epochs} epochs, max_steps={self.max_steps}: nothing to train.")
        return self.max_steps if self.max_steps > 0 else steps


# What the reference implements. A setting that changes the numbers and is not here is refused, not ignored.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "lr_scheduler_type": ("linear",),
    "lr_scheduler_kwargs": (None, {}),
    "optim": ("adamw_torch", "adamw_torch_fused", "muon"),
    "optim_args": (None,),
    "train_sampling_strategy": ("random",),
    "data_seed": (None,),
    "dataloader_drop_last": (False,),
    "neftune_noise_alpha": (None,),
    "bf16": (False,),
    "fp16": (False,),
    "bf16_full_eval": (False,),
    "fp16_full_eval": (False,),
    "auto_find_batch_size": (False,),
    "resume_from_checkpoint": (None,),
    "torch_compile": (False,),
    "eval_strategy": ("no", "epoch"),
    "eval_on_start": (False,),
    "eval_delay": (0,),
    "load_best_model_at_end": (False,),
    "use_liger_kernel": (False,),
    "fsdp": (None, ""),
    "deepspeed": (None,),
    "loss": (None, "cross_entropy"),
    "loss_kwargs": (None, {}),
    "attn_implementation": (None,),
    "freeze": (None, []),
    "param_group_rules": (None, []),
}


def loop_settings(args: "TrainingArguments") -> LoopSettings:
    """What the manual loop is told by `args`.

    Raises:
        ValueError: `args` ask for something that the reference does not implement; all such are named.
    """
    refused = [
        f"{name}={_plain(getattr(args, name))} (implemented: {', '.join(map(str, values))})"
        for name, values in IMPLEMENTED.items()
        if hasattr(args, name) and getattr(args, name) not in values
    ]
    if not getattr(args.accelerator_config, "use_seedable_sampler", True):
        refused.append("accelerator_config.use_seedable_sampler=False (implemented: True)")
    if refused:
        raise ValueError("the manual loop, the reference, does not implement " + "; ".join(refused))
    return LoopSettings(
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        eval_batch_size=args.per_device_eval_batch_size,
        evaluate_each_epoch=args.eval_strategy == "epoch",
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        fused=args.optim == "adamw_torch_fused",
        layerwise_lr_decay=getattr(args, "layerwise_lr_decay", 1.0),
        head_lr_multiplier=getattr(args, "head_lr_multiplier", 1.0),
        muon=args.optim == "muon",
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        label_smoothing=args.label_smoothing_factor,
        divide_by="items" if getattr(args, "loss_reduction", None) == "mean" else "weights",
        seed=args.seed,
        device=args.device,
    )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
