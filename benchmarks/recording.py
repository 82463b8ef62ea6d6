"""What recording costs: CPU time of a training step of about 20 ms, with a `TrainerRecorder` and without.

A small BERT classifier trains on one thread under `CustomTrainer`. The arms take turns within one process, the first
round is dropped, and the control is a second arm that does not record: how far its ratio is from 1 is this machine's noise.
Only whole steps are timed, from the end of step WARM_UP to the end of the last; what a run's begin and end take (digests of
all weights, the file of the final ones) stands apart, and so does the time inside the recorder's own methods, which says
what the difference of the arms says, without their noise.

Prints a Markdown table and writes `runs/bench/recording.json`.
"""

import gc
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.parity import TrainerRecorder
from trainer_ext.parity.environment import environment

LAYERS, HIDDEN, VOCABULARY = 2, 128, 1000
BATCH, LENGTH = 8, 32
WARM_UP, STEPS, ROUNDS = 16, 128, 9
ARMS = ("not recorded", "not recorded, control", "recorded")
OWN = ("_sees_batch", "_saw_window", "_saw_loss", "_saw_norm", "on_pre_optimizer_step", "on_step_end")
RESULTS = Path("runs/bench/recording.json")


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


def milliseconds(arm: str, folder: str) -> dict[str, float]:
    """CPU time of a step of one run; of a recorded one also inside the recorder, and of its begin and its end."""
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
    recorder = TimedRecorder(trainer, f"{folder}/record") if arm == "recorded" else None
    trainer.remove_callback(PrinterCallback)  # the table stands alone on the output
    clock = StepClock()
    trainer.add_callback(clock)
    gc.collect()
    trainer.train()
    found = {"step": clock.seconds / STEPS}
    if recorder is not None:
        own = recorder.seconds
        found |= {"inside a step": own["steps"] / STEPS, "begin": own["begin"], "end": own["end"]}
    return {name: 1000 * seconds for name, seconds in found.items()}


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def measure() -> dict[str, Any]:
    """Every arm's times, and their ratios round by round."""
    rounds: list[dict[str, dict[str, float]]] = []
    with TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            order = ARMS[turn % 3 :] + ARMS[: turn % 3]
            rounds.append({arm: milliseconds(arm, folder) for arm in order})
    kept = rounds[1:]
    parts = {arm: summary([one[arm]["step"] for one in kept]) for arm in ARMS}
    parts |= {name: summary([one["recorded"][name] for one in kept]) for name in ("inside a step", "begin", "end")}
    ratios = {arm: summary([one[arm]["step"] / one[ARMS[0]]["step"] for one in kept]) for arm in ARMS[1:]}
    inside = summary([one["recorded"]["inside a step"] / one["recorded"]["step"] for one in kept])
    model = {"layers": LAYERS, "hidden": HIDDEN, "vocabulary": VOCABULARY, "batch": BATCH, "length": LENGTH}
    return {
        "environment": environment(),
        "model": model,
        "steps": STEPS,
        "rounds": len(kept),
        "cpu_ms": parts,
        "ratios": ratios,
        "inside_share": inside,
        "runs": kept,
    }


def table(found: dict[str, Any]) -> str:
    cpu, ratios, shown = found["cpu_ms"], found["ratios"], found["environment"]
    named = {arm: f"a step, {arm}" for arm in ARMS}
    named |= {"inside a step": "a step, inside the recorder", "begin": "begin of a run", "end": "end of a run"}
    lines = [f"{', '.join(f'{name} {value}' for name, value in shown.items())}", ""]
    model = ", ".join(f"{name} {value}" for name, value in found["model"].items())
    lines += [f"BERT: {model}; {found['rounds']} rounds of {STEPS} steps"]
    lines += ["", "| CPU ms | min | median | max |", "|---|---|---|---|"]
    lines += [row(named[name], cpu[name], "{:.3f}") for name in named]
    lines += ["", "| ratio, round by round | min | median | max |", "|---|---|---|---|"]
    lines += [row(f"{arm} / {ARMS[0]}", ratios[arm], "{:.4f}") for arm in ARMS[1:]]
    lines += [row("inside the recorder / recorded step", found["inside_share"], "{:.4f}")]
    return "\n".join(lines)


def row(name: str, values: dict[str, float], form: str) -> str:
    return f"| {name} | " + " | ".join(form.format(values[key]) for key in ("min", "median", "max")) + " |"


def main() -> None:
    torch.set_num_threads(1)
    found = measure()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
