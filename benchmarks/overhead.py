"""What a step costs besides its arithmetic: a plain PyTorch loop, and those who do the loop for you.

One model so small that the arithmetic does not hide the rest: a BERT of one layer, on one thread. All arms train the same
rows in the same order with fused AdamW, a linear schedule and clipping, in float32. A clock in the model reads the time
at the first forward after `WARM_UP` steps and `STEPS` forwards later, so that whatever a framework does in a step counts,
and what it does before and after does not.

    python benchmarks/overhead.py [--rounds 8]

Prints a Markdown table and writes `runs/bench/overhead.json`. The peers are looked for in `runs/peers`, where `make bench`
puts them.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, default_data_collator
from transformers import logging as transformers_logging

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "runs" / "peers")]

from pairs import ROUNDS, measure, write  # noqa: E402

from trainer_ext import CustomTrainer, CustomTrainingArguments  # noqa: E402

LAYERS, HIDDEN, VOCABULARY = 1, 16, 100
BATCH, LENGTH = 4, 8
WARM_UP, STEPS = 30, 300
RATE, CLIP = 1e-3, 1.0


class Clock:
    """Reads the time as a forward of `model` begins."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.forwards = 0
        self.read: dict[int, tuple[float, float]] = {}
        model.register_forward_pre_hook(self._begins)

    def _begins(self, *_: Any) -> None:
        if self.forwards in (WARM_UP, WARM_UP + STEPS):
            self.read[self.forwards] = time.process_time(), time.perf_counter()
        self.forwards += 1

    def seconds(self) -> dict[str, float]:
        """Of one step."""
        start, end = self.read.values()
        return {"cpu": (end[0] - start[0]) / STEPS, "wall": (end[1] - start[1]) / STEPS}


def model() -> tuple[BertForSequenceClassification, Clock]:
    torch.manual_seed(0)
    made = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=LENGTH,
        )
    )
    return made.train(), Clock(made)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (BATCH * (WARM_UP + STEPS + 1), LENGTH), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(LENGTH).long(), "labels": int(row.sum() % 2)} for row in ids
    ]


ROWS = rows()
TOTAL = len(ROWS) // BATCH


def loader() -> DataLoader:
    return DataLoader(ROWS, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator)  # type: ignore[arg-type]


def optimiser(trained: torch.nn.Module) -> tuple[Any, Any]:
    made = torch.optim.AdamW(trained.parameters(), lr=RATE, fused=True)
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 - step / TOTAL)


def plain_loop() -> dict[str, float]:
    trained, clock = model()
    optimizer, schedule = optimiser(trained)
    for batch in loader():
        trained(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return clock.seconds()


def accelerate_loop() -> dict[str, float]:
    from accelerate import Accelerator

    accelerator, (trained, clock) = Accelerator(cpu=True), model()
    wrapped, optimizer, batches, schedule = accelerator.prepare(trained, *_reordered(trained))
    for batch in batches:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return clock.seconds()


def _reordered(trained: torch.nn.Module) -> tuple[Any, Any, Any]:
    optimizer, schedule = optimiser(trained)
    return optimizer, loader(), schedule


def by_trainer(cls: type[Trainer]) -> dict[str, float]:
    trained, clock = model()
    with TemporaryDirectory() as folder:
        args = CustomTrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, max_grad_norm=CLIP,
            use_cpu=True, save_strategy="no", report_to="none", logging_steps=100, dataloader_pin_memory=False,
            disable_tqdm=True, log_level="error",
        )  # fmt: skip
        trainer = cls(trained, args, default_data_collator, ROWS)
        trainer.remove_callback(_printer())
        trainer.train()
    return clock.seconds()


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def stock_trainer() -> dict[str, float]:
    return by_trainer(Trainer)


def custom_trainer() -> dict[str, float]:
    return by_trainer(CustomTrainer)


def fabric_loop() -> dict[str, float]:
    from lightning.fabric import Fabric

    fabric, (trained, clock) = Fabric(accelerator="cpu", devices=1), model()
    optimizer, schedule = optimiser(trained)
    wrapped, wrapped_optimizer = fabric.setup(trained, optimizer)
    for batch in fabric.setup_dataloaders(loader()):
        fabric.backward(wrapped(**batch).loss)
        fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=CLIP)
        wrapped_optimizer.step()
        schedule.step()
        wrapped_optimizer.zero_grad()
    return clock.seconds()


def lightning_trainer() -> dict[str, float]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.clock = model()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.trained(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimiser(self.trained)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=100,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module.clock.seconds()


def accelerated_trainer() -> dict[str, float]:
    from pytorch_accelerated import Trainer as Accelerated
    from pytorch_accelerated.callbacks import TerminateOnNaNCallback

    class Own(Accelerated):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            return {
                "loss": self.model(**batch).loss, "model_outputs": None, "batch_size": batch["labels"].size(0),
            }  # fmt: skip

    trained, clock = model()
    optimizer, schedule = optimiser(trained)
    trainer = Own(trained, loss_func=None, optimizer=optimizer, callbacks=(TerminateOnNaNCallback,))
    trainer.train(
        ROWS, num_epochs=1, per_device_batch_size=BATCH, gradient_clip_value=CLIP, collate_fn=default_data_collator,
        create_scheduler_fn=lambda _: schedule,
        train_dataloader_kwargs={"num_workers": 0, "pin_memory": False, "shuffle": True},
    )  # fmt: skip
    return clock.seconds()


ARMS = {
    "plain PyTorch": plain_loop,
    "accelerate": accelerate_loop,
    "Trainer": stock_trainer,
    "CustomTrainer": custom_trainer,
    "Lightning Fabric": fabric_loop,
    "Lightning": lightning_trainer,
    "pytorch-accelerated": accelerated_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    about = {"BERT layers": LAYERS, "hidden": HIDDEN, "batch": BATCH, "length": LENGTH, "steps": STEPS}
    write(measure(ARMS, "plain PyTorch", rounds=rounds, about=about), Path("runs/bench/overhead.json"))


if __name__ == "__main__":
    main()
