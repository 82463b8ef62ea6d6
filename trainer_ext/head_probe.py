"""Before the first batch: what the model's head does with its labels, where the loss depends on it."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from trainer_ext.losses.model_head import check_additive, probe
from trainer_ext.losses.of_batches import HeadLoss, LogitsLoss

logger = logging.get_logger(__name__)


def probe_head(trainer: Trainer, loss: HeadLoss | LogitsLoss, batch: dict[str, Any]) -> None:
    """Probe the head with a few rows, on every rank, and have the loss count as it does; what was found is logged.

    A loss over the logits needs no more than whether a language model's labels are those of the next token: some in
    the causal family (BART's) take labels that are shifted already.

    Raises:
        ValueError: The loss is the head's own, and is no mean over its labels.
    """
    if isinstance(loss, LogitsLoss) and not loss.shifted:
        return
    base = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else base
    accepted = inspect.signature(base.forward).parameters
    takes_it = "num_items_in_batch" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    own = loss if isinstance(loss, HeadLoss) else HeadLoss(["labels"])

    def mean(inputs: dict[str, Any], **told: Any) -> Tensor:
        return own.mean(model, {**inputs, **told} if takes_it else inputs)

    inputs = trainer._prepare_inputs({name: v for name, v in batch.items() if name != loss.sample_weights})
    with trainer.compute_loss_context_manager():
        found = probe(base, mean, own.denominator, inputs)
    loss.shifted = found.shifted
    if isinstance(loss, LogitsLoss):
        return
    half = torch.bfloat16 if trainer.args.bf16 or trainer.args.fp16 else None
    check_additive(
        found, type(base).__name__, half or next(p.dtype for p in base.parameters() if p.is_floating_point())
    )
    logger.info(
        f"{type(base).__name__}'s own loss is a mean over its labels, and "
        f"{'divides by' if found.divides else 'does not heed'} num_items_in_batch. It is not told: its mean is multiplied "
        "by the micro-batch's labels and divided by the step's."
    )
