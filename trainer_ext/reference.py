"""The manual loop under `TrainingArguments`: the same settings for both paths, and a clear no for the rest."""

from enum import Enum
from typing import Any

from transformers import TrainingArguments

from trainer_ext.manual_loop import LoopSettings

# What the reference implements. A setting that changes the numbers and is not here is refused, not ignored.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "lr_scheduler_type": ("linear",),
    "lr_scheduler_kwargs": (None, {}),
    "optim": ("adamw_torch", "adamw_torch_fused"),
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
    "loss": (None, "cross_entropy"),
    "loss_kwargs": (None, {}),
}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def loop_settings(args: TrainingArguments) -> LoopSettings:
    """What the manual loop is told by `args`.

    Raises:
        ValueError: `args` ask for something that the reference does not implement; all such are named.
    """
    refused = [
        f"{name}={_plain(getattr(args, name))} (implemented: {', '.join(map(str, values))})"
        for name, values in IMPLEMENTED.items()
        if hasattr(args, name) and getattr(args, name) not in values
    ]
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
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        label_smoothing=args.label_smoothing_factor,
        divide_by="items" if getattr(args, "loss_reduction", None) == "mean" else "weights",
        seed=args.seed,
        device=args.device,
    )
