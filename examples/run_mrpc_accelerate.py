"""The same fine-tuning through `accelerate.Accelerator`: the plain loop with the few lines that it takes to go parallel.

    python examples/run_mrpc_accelerate.py --output_dir runs/mrpc_accelerate
    accelerate launch examples/run_mrpc_accelerate.py --output_dir runs/mrpc_accelerate

The loop itself is `trainer_ext/accelerate_loop.py`; read it beside `trainer_ext/manual_loop.py`.
"""

from trainer_ext import accelerate_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.metrics import AccuracyAndF1
from trainer_ext.task import TaskParser, prepare_task


def main() -> None:
    task_arguments, args = TaskParser(description=__doc__).parse()
    settings = loop_settings(args)
    task = prepare_task(task_arguments)
    model = task.new_model(args.seed)

    result = accelerate_loop.train(
        model,
        task.train,
        task.collator,
        settings,
        eval_dataset=task.validation,
        metric=AccuracyAndF1(len(task.label_names)),
        class_weights=task.class_weights(args.class_weights),
    )

    if args.should_save:
        model.save_pretrained(args.output_dir)
        task.tokenizer.save_pretrained(args.output_dir)
        for epoch, evaluation in enumerate(result.evaluations, start=1):
            print(f"epoch {epoch}: {evaluation}")


if __name__ == "__main__":
    main()
