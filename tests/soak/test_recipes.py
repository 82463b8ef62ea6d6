"""What layer-wise rates, a faster head and averaged weights are worth on MRPC: a pretrained MiniLM in bf16, three seeds.

Every arm differs from the stock recipe in one thing, at a usual value; nothing is tuned. The validation split is looked at
once, after the last epoch; the averaged weights are those of the same runs as the stock recipe's. The table goes to
`docs/proof/recipes.md`.
"""

import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.soak.mrpc_recipe import EPOCHS, recipe, table
from tests.soak.test_mrpc import MRPC, checkpoint, needs_mrpc  # noqa: F401  (a fixture)
from trainer_ext.callbacks.ema import EMACallback
from trainer_ext.finetune import build_trainer
from trainer_ext.task import TaskArguments, prepare_task

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
PROOF, RECORDS = ROOT / "docs" / "proof" / "recipes.md", ROOT / "runs" / "recipes"  # one JSON a run
SEEDS, EMA_DECAY = (0, 1, 2), 0.99
ARMS = {
    "stock": {},
    "layerwise_lr_decay 0.9": {"layerwise_lr_decay": 0.9},
    "head_lr_multiplier 10": {"head_lr_multiplier": 10.0},
}
AVERAGED = f"stock, EMA {EMA_DECAY}"
METRICS = ("accuracy", "f1", "loss")


class KeepsRaw(EMACallback):
    """Keeps the trained weights before the averages take their place."""

    def on_train_end(self, *args, model=None, **kwargs):
        self.raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        super().on_train_end(*args, model=model, **kwargs)


def evaluated(trainer):
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in METRICS}


def run(arm, seed, task, folder):
    """The metrics of the rows of the table that one run gives."""
    trainer = build_trainer(task, recipe(folder, seed, **ARMS[arm]))
    if arm != "stock":
        trainer.train()
        return {arm: evaluated(trainer)}
    average = KeepsRaw(decay=EMA_DECAY)
    trainer.add_callback(average)
    trainer.train()
    averaged = evaluated(trainer)
    trainer.model.load_state_dict(average.raw)
    return {AVERAGED: averaged, arm: evaluated(trainer)}


@needs_mrpc
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_arm(checkpoint, tmp_path, arm, seed):  # noqa: F811
    task = prepare_task(TaskArguments(dataset=str(MRPC), model=str(checkpoint)))
    found = run(arm, seed, task, tmp_path / "out")
    assert all(0.5 < metrics["accuracy"] <= 1 for metrics in found.values())
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{list(ARMS).index(arm)}_{seed}.json").write_text(json.dumps(found))


def test_the_table():
    """Written of all runs that are there; each row needs every seed."""
    runs = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    rows = {row: [run[row] for run in runs if row in run] for row in ("stock", AVERAGED, *list(ARMS)[1:])}
    assert {row: len(found) for row, found in rows.items()} == dict.fromkeys(rows, len(SEEDS))
    lines = [
        "# Layer-wise rates, a faster head, averaged weights on MRPC\n",
        f"Generated on {date.today().isoformat()} by `make soak`, with torch {version('torch')} and "
        f"transformers {version('transformers')}: MiniLM, {EPOCHS} epochs of batch 16 in bf16, learning rate 5e-5 with "
        "linear decay after 10% of warmup, batches grouped by length. Each row changes one thing of the first, nothing is "
        f"tuned. Mean and standard deviation over {len(SEEDS)} seeds, on the whole validation split after the last epoch; "
        "the averages (EMA) are of the first row's runs.\n",
        *table("recipe", METRICS, rows),
    ]
    PROOF.write_text("\n".join(lines) + "\n")
