"""The same fine-tuning without a Trainer: the plain PyTorch loop that CustomTrainer is held against.

    python examples/run_mrpc_manual.py --output_dir runs/mrpc_manual

The loop itself is `trainer_ext/manual_loop.py`; it takes the arguments that it implements and refuses others.
"""

from trainer_ext import manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.metrics import AccuracyAndF1
from trainer_ext.task import TaskParser, prepare_task


def main() -> None:
    task_arguments, args = TaskParser(description=__doc__).parse()
    settings = loop_settings(args)
    task = prepare_task(task_arguments)
    model = task.new_model(args.seed)

    result = manual_loop.train(
        model,
        task.train,
        task.collator,
        settings,
        eval_dataset=task.validation,
        metric=AccuracyAndF1(len(task.label_names)),
        class_weights=task.class_weights(args.class_weights),
    )

    model.save_pretrained(args.output_dir)
    task.tokenizer.save_pretrained(args.output_dir)
    for epoch, evaluation in enumerate(result.evaluations, start=1):
        print(f"epoch {epoch}: {evaluation}")


if __name__ == "__main__":
    main()
