"""Pairs of clean runs, which a comparison has to find equal: one training by another path, split or process.

torchrun --nproc_per_node 2 -m tests.soak.clean_pairs FOLDER records the candidates of two ranks.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainerCallback,
    default_data_collator,
)

from tests.conftest import SIZES, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, class_weights, manual_loop
from trainer_ext.loop_settings import loop_settings
from trainer_ext.metrics import AccuracyAndF1, compute_metrics
from trainer_ext.parity import Recorder, TrainerRecorder, Trajectory
from trainer_ext.parity.tolerance import BITWISE, ROUNDING

PAD, SEQUENCE = 0, 8
KINDS = {
    "same split": (
        "the manual loop / `CustomTrainer`, the same micro-batches, dropout on",
        BITWISE,
    ),
    "another split, float32": (
        "the manual loop with a step's rows in one batch / `CustomTrainer` in micro-batches, dropout 0",
        ROUNDING["float32"],
    ),
    "another split, float64": (
        "the same in float64",
        ROUNDING["float64"],
    ),
    "resumed": (
        "`CustomTrainer` in one go / stopped, and resumed from its checkpoint by a new trainer, dropout on",
        BITWISE,
    ),
    "two ranks": (
        "the manual loop with a step's rows in one batch / `CustomTrainer` under DDP on two ranks, dropout 0",
        ROUNDING["float32"],
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two runs of the same training.

    Attributes:
        kind: In what they differ, see `KINDS`.
        model: A name in `MODELS`.
        seed: Of the model, of the rows and of the training.
        split: Rows of a micro-batch, and micro-batches of a step on each rank.
        rows: To train on.
        steps: Optimizer steps; by default two epochs.
        weighted: Whether classes are.
        stopped_at: The step after which the candidate is stopped and resumed.
        tokens: Whether tokens are classified.
    """

    kind: str
    model: str
    seed: int
    split: tuple[int, int]
    rows: int
    steps: int = -1
    weighted: bool = False
    stopped_at: int | None = None
    tokens: bool = False

    def __str__(self) -> str:
        stop = "" if self.stopped_at is None else f", stopped at {self.stopped_at}"
        head = ", tokens" if self.tokens else ""
        size, count = self.split
        return f"{self.kind}: {self.model}{head}, seed {self.seed}, {self.rows} rows by {size}x{count}{stop}"

    @property
    def whole_batch(self) -> bool:
        return not KINDS[self.kind][1].bitwise

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.kind.endswith("float64") else torch.float32

    @property
    def world_size(self) -> int:
        return 2 if self.kind == "two ranks" else 1


def bert(pair: Pair, dropout: float) -> torch.nn.Module:
    return tiny_model(pair.seed, dropout=dropout, tokens=pair.tokens)


def roberta(pair: Pair, dropout: float) -> torch.nn.Module:
    odds = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, **odds, pad_token_id=PAD))


def gpt2(pair: Pair, dropout: float) -> torch.nn.Module:
    sizes = {"vocab_size": SIZES["vocab_size"], "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    odds = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **odds, pad_token_id=PAD, bos_token_id=1, eos_token_id=2))


MODELS = {"bert": bert, "roberta": roberta, "gpt2": gpt2}


def pairs() -> list[Pair]:
    """All of them."""
    one_batch, ragged, cut = ((8, 1), 22, -1, False), ((4, 4), 22, -1, True), ((3, 2), 40, 10, True)
    same = [
        Pair("same split", name, seed, *how) for name, seed, how in product(MODELS, (0, 1), (one_batch, ragged, cut))
    ]
    same += [Pair("same split", "bert", 2, split, 22, weighted=True, tokens=True) for split in ((8, 1), (4, 4))]
    ways = (2, (4, 4), 22, -1, True), (3, (1, 8), 29, -1, False), (4, (3, 5), 40, 60, True)
    others = [
        Pair(f"another split, {d}", name, *how) for d, name, how in product(("float32", "float64"), MODELS, ways)
    ]
    stops = (5, (4, 2), 22, -1, True, 2), (6, (4, 4), 22, -1, False, 2)  # within an epoch, and at the end of one
    resumed = [Pair("resumed", name, *how) for name, how in product(MODELS, stops)]
    shares = (7, (4, 2), 32, 6, True), (8, (4, 2), 20, -1, False)  # the second leaves a rank without rows
    return [*same, *others, *resumed, *(Pair("two ranks", name, *how) for name, how in product(MODELS, shares))]


def model_of(pair: Pair) -> torch.nn.Module:
    torch.manual_seed(pair.seed)
    return MODELS[pair.model](pair, 0.0 if pair.whole_batch else 0.1).to(pair.dtype)


def rows_of(pair: Pair, count: int, seed: int) -> Dataset:
    """Rows of three to eight tokens, padded on the right; all of eight where tokens are classified."""
    data = rows(count, seed=seed, tokens=pair.tokens)
    if pair.tokens:
        return data
    lengths = torch.randint(3, SEQUENCE + 1, (count,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(SEQUENCE) < lengths[:, None]).long()
    ids = torch.tensor(data["input_ids"]) * mask  # PAD is 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": data["labels"]})


def data_of(pair: Pair) -> tuple[Dataset, Dataset]:
    return rows_of(pair, pair.rows, 10 + pair.seed), rows_of(pair, 13, 100 + pair.seed)


def arguments(pair: Pair, folder: Path) -> CustomTrainingArguments:
    size, count = pair.split
    return CustomTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count,
        num_train_epochs=2,
        max_steps=pair.steps,
        class_weights=[1.0, 3.0] if pair.weighted else None,
        seed=pair.seed,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2,
        eval_strategy="epoch",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def by_hand(pair: Pair, folder: Path) -> Trajectory:
    """The manual loop's run; in one batch a step where the pair says so."""
    settings = loop_settings(args := arguments(pair, folder))
    if pair.whole_batch:
        size = settings.batch_size * settings.accumulation * pair.world_size
        settings = replace(settings, batch_size=size, accumulation=1)
    train, evaluation = data_of(pair)
    weights = None if args.class_weights is None else class_weights(args.class_weights, 2)
    model, recorder = model_of(pair), Recorder("manual loop")
    recorder.begin(model)
    recorder.watch()
    result = manual_loop.train(
        model,
        train,
        default_data_collator,
        settings,
        eval_dataset=evaluation,
        metric=AccuracyAndF1(),
        class_weights=weights,
        on_step=recorder.step,
        on_evaluate=recorder.evaluation,
        progress=False,
    )
    recorder.end(result.optimizer)
    return recorder.trajectory()


class StopAndSave(TrainerCallback):
    """Stops a run after a step, and has it leave a checkpoint; at an epoch's end after its evaluation, which draws from
    the generators."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.epoch != int(state.epoch):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.epoch == int(state.epoch):
            control.should_save = control.should_training_stop = True


def by_trainer(pair: Pair, folder: Path, *, stopped_at: int | None = None) -> Trajectory:
    """`CustomTrainer`'s run, recorded in the folder; stopped and resumed where the pair says so."""
    if stopped_at is not None:
        run, _ = recorded(pair, folder)
        run.add_callback(StopAndSave(stopped_at))
        run.train()
    run, recorder = recorded(pair, folder)
    run.train(resume_from_checkpoint=None if stopped_at is None else str(folder / "out" / f"checkpoint-{stopped_at}"))
    return recorder.finish()


def recorded(pair: Pair, folder: Path) -> tuple[CustomTrainer, TrainerRecorder]:
    train, evaluation = data_of(pair)
    run = CustomTrainer(
        model=model_of(pair),
        args=arguments(pair, folder),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics(),
    )
    return run, TrainerRecorder(run, folder / "record")


def main(folder: Path) -> None:
    """What each of two ranks runs."""
    for pair in pairs():
        if pair.kind == "two ranks":
            run = by_trainer(pair, folder / str(pair))
            assert run.runs_on["engine"] == "DistributedDataParallel", run.runs_on
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
