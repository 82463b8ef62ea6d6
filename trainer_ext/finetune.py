"""Fine-tune a task from start to saved model: through `CustomTrainer`, or through the manual loop."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trainer_ext import manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.metrics import AccuracyAndF1, compute_metrics
from trainer_ext.task import Task
from trainer_ext.trainer import CustomTrainer


def build_trainer(task: Task, args: TrainingArguments) -> CustomTrainer:
    """A `CustomTrainer` on `task`, its labels and weights checked.

    Raises:
        ValueError: The arguments do not fit the task.
    """
    return CustomTrainer(
        model=task.new_model(args.seed),
        args=args,
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        compute_metrics=compute_metrics(len(task.label_names)),
    )


def train(trainer: CustomTrainer) -> dict[str, Any]:
    """Train, evaluate once where there is a validation split, and save the model and the metrics.

    Returns:
        The metrics of training and evaluation.
    """
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    trainer.save_metrics("train", metrics)
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.save_metrics("eval", evaluation)
        metrics = {**metrics, **evaluation}
    return metrics


def train_manually(task: Task, args: TrainingArguments) -> dict[str, float]:
    """The same by the manual loop; the model and `eval_results.json` go to `args.output_dir`.

    Returns:
        The last evaluation, empty without a validation split.
    """
    settings = loop_settings(args)
    model = task.new_model(args.seed)
    result = manual_loop.train(
        model,
        task.train,
        task.collator,
        settings,
        eval_dataset=task.validation,
        metric=AccuracyAndF1(len(task.label_names)),
        class_weights=task.class_weights(getattr(args, "class_weights", None)),
        progress=not args.disable_tqdm,
    )
    folder = Path(str(args.output_dir))
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    evaluation = result.evaluations[-1] if result.evaluations else {}
    metrics = {f"eval_{name}": value for name, value in evaluation.items()}
    (folder / "eval_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True))
    return metrics
