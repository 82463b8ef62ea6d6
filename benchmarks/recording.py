"""What recording costs: CPU time of a training step of about 20 ms, with a `TrainerRecorder` and without.

A small BERT classifier trains on one thread under `CustomTrainer`. Whole steps are timed, from the end of step WARM_UP to
the end of the last; what a run's begin and end take (digests of all weights, the file of the final ones) stands apart, and
so does the time inside the recorder's own methods, which says what the difference of the arms says, without their noise.

    python benchmarks/recording.py

Prints a table and writes `recording.json`.
"""

import time
from collections import Counter
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pairs import measure, pin_to_one_core, write
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.parity import TrainerRecorder

LAYERS, HIDDEN, VOCABULARY = 2, 128, 1000
BATCH, LENGTH = 8, 32
WARM_UP, STEPS = 16, 128
OWN = ("_sees_batch", "_saw_window", "_saw_loss", "_saw_norm", "on_pre_optimizer_step", "on_step_end")


class TimedRecorder(TrainerRecorder):
    """Adds up the CPU time that its own methods take: of a run's begin, of its end, and of the timed steps."""

    def __init__(self, *args: Any) -> None:
        self.seconds: Counter[str] = Counter()
        self._time("on_train_begin", "begin")
        self._time("on_train_end", "end")
        for name in OWN:
            self._time(name, "steps")
        super().__init__(*args)

    def _time(self, name: str, part: str) -> None:
        own = getattr(self, name)

        def method(*args: Any, **kwargs: Any) -> None:
            start = time.process_time()
            own(*args, **kwargs)
            if part != "steps" or self.recorder.steps >= WARM_UP:
                self.seconds[part] += time.process_time() - start

        setattr(self, name, method)


class StepClock(TrainerCallback):
    """The CPU time from the end of step WARM_UP to the end of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.start = time.process_time()
        self.seconds = time.process_time() - self.start if state.global_step > WARM_UP else 0.0


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (BATCH * (WARM_UP + STEPS), LENGTH), generator=generator)
    same = {"attention_mask": torch.ones(LENGTH).long(), "token_type_ids": torch.zeros(LENGTH).long()}
    return [{"input_ids": row, **same, "labels": row.sum() % 2} for row in ids]


def seconds(recorded: bool, folder: str, inside: list[dict[str, float]]) -> dict[str, float]:
    """CPU time of a step of one run; a recorded one adds what the recorder took to `inside`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=LENGTH,
    )
    arguments = CustomTrainingArguments(
        f"{folder}/out",
        per_device_train_batch_size=BATCH,
        max_steps=WARM_UP + STEPS,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
    )
    trainer = CustomTrainer(BertForSequenceClassification(config), arguments, train_dataset=rows())
    recorder = TimedRecorder(trainer, f"{folder}/record") if recorded else None
    trainer.remove_callback(PrinterCallback)  # the table stands alone on the output
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    if recorder is not None:
        own = recorder.seconds
        inside.append({"step": own["steps"] / STEPS, "begin": own["begin"], "end": own["end"]})
    return {"cpu": clock.seconds / STEPS}


def main() -> None:
    torch.set_num_threads(1)
    pin_to_one_core()
    about = {"BERT layers": LAYERS, "hidden": HIDDEN, "batch": BATCH, "length": LENGTH, "steps": STEPS}
    inside: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        arms = {
            "not recorded": partial(seconds, False, folder, inside),
            "recorded": partial(seconds, True, folder, inside),
        }
        found = measure(arms, "not recorded", rounds=61, about=about)
    for part in ("step", "begin", "end"):
        took = median(one[part] for one in inside[1:])
        found["about"][f"inside the recorder, {part}"] = f"{1000 * took:.3f} ms"
    write(found, "recording")


if __name__ == "__main__":
    main()
