"""The recipe that arms of a comparison on MRPC share: MiniLM, bf16, batch 16, nothing tuned."""

from statistics import mean, stdev

from trainer_ext.arguments import CustomTrainingArguments

EPOCHS = 3


def recipe(folder, seed, **changes):
    """Its arguments, with what an arm changes."""
    return CustomTrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        learning_rate=5e-5,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        bf16=True,
        train_sampling_strategy="group_by_length",
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )


def table(first, metrics, rows):
    """Markdown: a line for each of `rows` (its runs, by name), with mean and standard deviation of each metric."""
    lines = [f"| {first} | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, runs in rows.items():
        cells = [f"{mean(run[m] for run in runs):.3f} ± {stdev(run[m] for run in runs):.3f}" for m in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
