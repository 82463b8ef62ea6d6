"""Before the first step of a run whose loss is the model's own: the question whether it can be put together exactly."""

import inspect
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from trainer_ext.losses.model_head import probe
from trainer_ext.losses.of_batches import HeadLoss

logger = logging.get_logger(__name__)


def probe_head(trainer: Trainer, loss: HeadLoss, batch: dict[str, Any]) -> None:
    """Probe the head with a few rows of the first batch, on every rank, and log what was found.

    Raises:
        ValueError: The head's loss is no mean over its labels.
    """
    base = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else base
    accepted = inspect.signature(base.forward).parameters
    takes_it = "num_items_in_batch" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())

    def mean(inputs: dict[str, Any], **told: Any) -> Tensor:
        return loss.terms(model, {**inputs, **told} if takes_it else inputs)[0].mean()

    half = trainer.args.bf16 or trainer.args.fp16
    with trainer.compute_loss_context_manager():
        divides = probe(base, mean, loss.denominator, trainer._prepare_inputs(batch), half_precision=half)
    logger.info(
        f"{type(base).__name__}'s own loss is a mean over its labels, and "
        f"{'divides by' if divides else 'does not heed'} num_items_in_batch. It is not told: its mean is multiplied by the "
        "micro-batch's labels and divided by the step's."
    )
