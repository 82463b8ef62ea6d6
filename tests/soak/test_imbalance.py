"""Which loss for imbalance: MRPC with 5% of the rows of label 0 left in training, a pretrained MiniLM, three seeds.

Every arm differs in its loss alone, options are the papers' defaults, nothing is tuned. The validation split is whole,
and looked at once, after the last epoch. The table goes to `docs/proof/imbalance.md`.
"""

import dataclasses
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score, roc_auc_score

from tests.soak.mrpc_recipe import EPOCHS, recipe, table
from tests.soak.test_mrpc import MRPC, checkpoint, needs_mrpc  # noqa: F401  (a fixture)
from trainer_ext.finetune import build_trainer
from trainer_ext.task import TaskArguments, prepare_task

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
PROOF, RECORDS = ROOT / "docs" / "proof" / "imbalance.md", ROOT / "runs" / "imbalance"  # one JSON a run
RARE, SHARE, SEEDS = 0, 0.05, (0, 1, 2)
ARMS = {
    "cross-entropy": {"loss": "cross_entropy"},
    "weighted (balanced)": {"loss": "cross_entropy", "class_weights": "balanced"},
    "focal, gamma 2": {"loss": "focal"},
    "logit-adjusted, tau 1": {"loss": "logit_adjusted"},
    "LDAM": {"loss": "ldam"},
}
METRICS = ("accuracy", "macro F1", "MCC", "AUROC", "recall of label 0")


def thinned(task):
    """The task with a share of its training rows of the rare label, the same ones for every arm and seed."""
    labels = np.array(task.train["labels"])
    rare = np.random.default_rng(0).permutation(np.flatnonzero(labels == RARE))
    kept = np.sort(np.concatenate([np.flatnonzero(labels != RARE), rare[: round(SHARE * len(rare))]]))
    return dataclasses.replace(task, train=task.train.select(kept))


def run(arm, seed, task, folder):
    """The metrics of one arm and seed on the validation split."""
    trainer = build_trainer(task, recipe(folder, seed, **ARMS[arm]))
    trainer.train()
    found = trainer.predict(task.validation)
    scores, labels = found.predictions[:, 1] - found.predictions[:, 0], found.label_ids
    predicted = found.predictions.argmax(-1)
    values = (
        accuracy_score(labels, predicted),
        f1_score(labels, predicted, average="macro"),
        matthews_corrcoef(labels, predicted),
        roc_auc_score(labels, scores),
        recall_score(labels, predicted, pos_label=RARE),
    )
    return dict(zip(METRICS, map(float, values), strict=True))


@needs_mrpc
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_arm(checkpoint, tmp_path, arm, seed):  # noqa: F811
    task = thinned(prepare_task(TaskArguments(dataset=str(MRPC), model=str(checkpoint))))
    found = {"arm": arm, "seed": seed, "rows": len(task.train), **run(arm, seed, task, tmp_path / "out")}
    assert 0.5 < found["AUROC"] <= 1
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{list(ARMS).index(arm)}_{seed}.json").write_text(json.dumps(found))


def test_the_table():
    """Written of all runs that are there; each arm needs every seed."""
    runs = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    by_arm = {arm: [one for one in runs if one["arm"] == arm] for arm in ARMS}
    assert {arm: len(found) for arm, found in by_arm.items()} == dict.fromkeys(ARMS, len(SEEDS))
    lines = [
        "# Losses on an imbalanced MRPC\n",
        f"Generated on {date.today().isoformat()} by `make soak`, with torch {version('torch')} and transformers "
        f"{version('transformers')}: MRPC with {SHARE:.0%} of the training rows of label {RARE} "
        f"({runs[0]['rows']} rows in all), MiniLM, {EPOCHS} epochs of batch 16 in bf16, learning rate 5e-5, nothing tuned. "
        f"Mean and standard deviation over {len(SEEDS)} seeds, on the whole validation split after the last epoch.\n",
        *table("loss", METRICS, by_arm),
    ]
    PROOF.write_text("\n".join(lines) + "\n")
