"""Paraphrases by a small encoder: a model and a loss of one's own through CustomTrainer, and the recipe for MRPC.

    python examples/paraphrases.py --output_dir runs/paraphrases --dataset glue/mrpc \\
        --model sentence-transformers/all-MiniLM-L6-v2

The model is told which words two sentences share (`pair_model.py`), and gives the mean of its answers to both orders. The
loss is R-Drop (Liang et al. 2021, https://arxiv.org/abs/2106.14448). docs/recipe.md says what each part is worth, and what
did not help. Every field of `TrainingArguments` is an option, and wins over the recipe's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pair_model import PairClassifier
from torch import Tensor

from trainer_ext import LOSSES, CustomTrainer, CustomTrainingArguments
from trainer_ext.fast import fast_profile
from trainer_ext.losses.contract import ClassLoss, LossTerms, full_precision
from trainer_ext.metrics import compute_metrics
from trainer_ext.models import checkpoint_folder
from trainer_ext.task import Task, TaskParser, prepare_task

RECIPE: dict[str, Any] = fast_profile(
    learning_rate=4e-5,
    num_train_epochs=3,
    per_device_train_batch_size=16,
    warmup_steps=0.1,
    weight_decay=0.01,
    freeze=["*.word_embeddings.*"],
    head_lr_multiplier=10.0,
    param_group_rules=[{"match": "shared.pull", "lr_multiplier": 500, "weight_decay": 0}],
)


class RDrop(ClassLoss):
    """The mean cross-entropy of two readings of a row, plus `alpha` times how far apart they are (symmetric KL divergence).

    Logits of two readings have the shape (B, 2, C); those of one, (B, C), have cross-entropy.
    """

    def __call__(self, logits: Tensor, labels: Tensor, *, alpha: float = 2.0, **options: Any) -> LossTerms:
        if logits.ndim == 2:
            return LOSSES["cross_entropy"](logits, labels, **options)
        readings = logits.unbind(dim=1)
        each = [LOSSES["cross_entropy"](reading, labels, **options) for reading in readings]
        p, q = (full_precision(reading).log_softmax(-1) for reading in readings)
        apart = sum(F.kl_div(one, other, log_target=True, reduction="sum") for one, other in ((p, q), (q, p))) / 2
        return LossTerms(torch.stack([terms.numerator for terms in each]).mean() + alpha * apart, each[0].denominator)


def build_trainer(task: Task, args: CustomTrainingArguments) -> CustomTrainer:
    """A trainer of `task` by this model and loss."""
    torch.manual_seed(args.seed)
    labels = dict(enumerate(task.label_names))
    model = PairClassifier.from_pretrained(
        checkpoint_folder(task.model),
        attn_implementation="eager",  # the bias of the heads is an attention mask with numbers in it
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )
    return CustomTrainer(
        model=model,
        args=args,
        loss=RDrop(),
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        compute_metrics=compute_metrics(len(task.label_names)),
    )


def main() -> None:
    parser = TaskParser(description=__doc__)
    parser.set_defaults(**RECIPE)
    task_arguments, args = parser.parse()
    trainer = build_trainer(prepare_task(task_arguments), args)
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
