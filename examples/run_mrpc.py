"""Fine-tune a sentence-pair classifier on GLUE MRPC with CustomTrainer.

    python examples/run_mrpc.py --output_dir runs/mrpc
    python examples/run_mrpc.py --output_dir runs/mrpc --dataset glue/mrpc --model bert-base-uncased \\
        --class_weights balanced --gradient_accumulation_steps 4 --learning_rate 3e-5

With `--output_dir` alone it trains on MRPC, or on the built-in sample when no hub can be reached. Every field of
`TrainingArguments` is an option.
"""

from trainer_ext import CustomTrainer
from trainer_ext.finetune import checkpoint_to_resume
from trainer_ext.metrics import compute_metrics
from trainer_ext.task import TaskParser, prepare_task


def main() -> None:
    # The arguments come before the model: DeepSpeed and FSDP have to be set up when its weights are made.
    task_arguments, args = TaskParser(description=__doc__).parse()
    task = prepare_task(task_arguments)

    trainer = CustomTrainer(
        model=task.new_model(args.seed),
        args=args,
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        compute_metrics=compute_metrics(len(task.label_names)),
    )

    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)

    if task.validation is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
