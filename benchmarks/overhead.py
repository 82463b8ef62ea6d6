"""What a step costs besides its arithmetic: a plain PyTorch loop, and those who do the loop for you.

One model so small that the arithmetic does not hide the rest: a BERT of one layer, on one thread. All arms train the same
rows in the same order with fused AdamW, a linear schedule and clipping, in float32. Each is a process of its own, all are
on one core, and they take turns of `STEPS` steps; a turn ends as a forward begins, so that whatever a framework does in a
step counts, and what it does before and after training does not.

    python benchmarks/overhead.py [--rounds 60] [--arms Trainer CustomTrainer]

Prints a Markdown table, and what each adds to the plain loop as a ratio to what `Trainer` adds; writes
`benchmarks/results/overhead.json` when all arms have run. The peers are looked for in `runs/peers`, where `make bench` puts
them.
"""

import argparse
import logging
import sys
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

from pairs import Segments, added, pin_to_one_core, table, take_turns, write  # noqa: E402

from trainer_ext import CustomTrainer, CustomTrainingArguments  # noqa: E402

LAYERS, HIDDEN, VOCABULARY = 1, 16, 100
BATCH, LENGTH = 4, 8
WARM_UP, STEPS = 30, 20
ROUNDS = 60  # turns of each, the first of them dropped
RATE, CLIP = 1e-3, 1.0
MOST_STEPS = 10_000


class Clock:
    """Ends a turn after each `STEPS` forwards of `model`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._forwards, self._segments = 0, Segments()
        model.register_forward_pre_hook(self._begins)

    def _begins(self, *_: Any) -> None:
        if self._forwards >= WARM_UP and (self._forwards - WARM_UP) % STEPS == 0:
            self._segments.next()
        self._forwards += 1


def model() -> BertForSequenceClassification:
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
    Clock(made)
    return made.train()


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (BATCH * MOST_STEPS, LENGTH), generator=generator)
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


def plain_loop() -> None:
    trained = model()
    optimizer, schedule = optimiser(trained)
    for batch in loader():
        trained(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def accelerate_loop() -> None:
    from accelerate import Accelerator

    accelerator, trained = Accelerator(cpu=True), model()
    wrapped, optimizer, batches, schedule = accelerator.prepare(trained, *_reordered(trained))
    for batch in batches:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _reordered(trained: torch.nn.Module) -> tuple[Any, Any, Any]:
    optimizer, schedule = optimiser(trained)
    return optimizer, loader(), schedule


def by_trainer(cls: type[Trainer]) -> None:
    trained = model()
    with TemporaryDirectory() as folder:
        args = CustomTrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, max_grad_norm=CLIP,
            use_cpu=True, save_strategy="no", report_to="none", dataloader_pin_memory=False,
            disable_tqdm=True, log_level="error",
        )  # fmt: skip
        trainer = cls(trained, args, default_data_collator, ROWS)
        trainer.remove_callback(_printer())
        trainer.train()


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def stock_trainer() -> None:
    by_trainer(Trainer)


def custom_trainer() -> None:
    by_trainer(CustomTrainer)


def fabric_loop() -> None:
    from lightning.fabric import Fabric

    fabric, trained = Fabric(accelerator="cpu", devices=1), model()
    optimizer, schedule = optimiser(trained)
    wrapped, wrapped_optimizer = fabric.setup(trained, optimizer)
    for batch in fabric.setup_dataloaders(loader()):
        fabric.backward(wrapped(**batch).loss)
        fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=CLIP)
        wrapped_optimizer.step()
        schedule.step()
        wrapped_optimizer.zero_grad()


def lightning_trainer() -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.trained = model()

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
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=500,
    )  # fmt: skip
    trainer.fit(module, loader())


def accelerated_trainer() -> None:
    from pytorch_accelerated import Trainer as Accelerated
    from pytorch_accelerated.callbacks import TerminateOnNaNCallback

    class Own(Accelerated):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            return {
                "loss": self.model(**batch).loss, "model_outputs": None, "batch_size": batch["labels"].size(0),
            }  # fmt: skip

    trained = model()
    optimizer, schedule = optimiser(trained)
    trainer = Own(trained, loss_func=None, optimizer=optimizer, callbacks=(TerminateOnNaNCallback,))
    trainer.train(
        ROWS, num_epochs=1, per_device_batch_size=BATCH, gradient_clip_value=CLIP, collate_fn=default_data_collator,
        create_scheduler_fn=lambda _: schedule,
        train_dataloader_kwargs={"num_workers": 0, "pin_memory": False, "shuffle": True},
    )  # fmt: skip


BASE = "plain PyTorch"
ARMS = {
    BASE: plain_loop,
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
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="beside the plain loop")
    parser.add_argument("--run", choices=ARMS, help=argparse.SUPPRESS)  # in an arm's own process
    asked = parser.parse_args()
    pin_to_one_core()
    torch.set_num_threads(1)
    if asked.run:
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        logging.getLogger("lightning").setLevel(logging.ERROR)
        ARMS[asked.run]()
        return
    programs = {name: [sys.executable, __file__, "--run", name] for name in ARMS if name in (BASE, *asked.arms)}
    about = {"BERT layers": LAYERS, "hidden": HIDDEN, "batch": BATCH, "length": LENGTH, "steps a turn": STEPS}
    found = take_turns(programs, BASE, rounds=asked.rounds, about=about)
    if "Trainer" in programs:
        found["added"] = {kind: added(found, "Trainer", kind) for kind in found["runs"][0][BASE]}
    if len(programs) == len(ARMS):
        write(found, "overhead", scale=1000 / STEPS)
    else:
        print(table(found, scale=1000 / STEPS))
    for kind, ratios in found.get("added", {}).items():
        print(
            f"\nadded {kind} time, to Trainer's: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}"
        )


if __name__ == "__main__":
    main()
