"""`CustomTrainer` and its arguments given what cannot be: a ValueError before the first step, and no file."""

import pytest
import torch

from tests.bad_input.laid_out import seen
from tests.conftest import rows, tiny_model

MISUSES = {
    "an unknown loss": ({"loss": "dise"}, {}, "loss 'dise' is not known"),
    "an optimizer with groups of its own beside our groups": (
        {"layerwise_lr_decay": 0.9},
        {"optimizers": lambda model: (torch.optim.SGD(model.parameters(), 0.1), None)},
        "layerwise_lr_decay would be ignored",
    ),
    "class weights for other classes": ({"class_weights": [1.0, 2.0, 3.0]}, {}, "has 3 weights"),
    "a weight that is not a number": ({"class_weights": [1.0, float("nan")]}, {}, r"class_weights\[1\] is nan"),
    "a column of weights that is not there": ({"sample_weight_column": "w"}, {}, "sample_weight_column='w'"),
    "a rule that matches nothing": ({"param_group_rules": [{"match": "x", "weight_decay": 0}]}, {}, "matches no parameter"),
    "a pattern that freezes nothing": ({"freeze": ["nothing"]}, {}, "'nothing' matches no parameter"),
    "two wrong knobs at once": (
        {"layerwise_lr_decay": 2, "head_lr_multiplier": -1}, {}, "layerwise_lr_decay=2 .*; head_lr_multiplier=-1",
    ),
    "a seed below 0": ({"seed": -1}, {}, "seed=-1 must lie in 0"),
    "a config that is no JSON": ({"accelerator_config": "{x"}, {}, "accelerator_config='{x' cannot be read as JSON"),
    "a config that is not there": ({"deepspeed": "nowhere.json"}, {}, "deepspeed='nowhere.json' .*No such file"),
    "labels beyond the model's": ({}, {"train": lambda: rows(num_labels=9)}, "is outside 0..1, the model's 2 labels"),
    "no checkpoint by that name": ({}, {"resume": "run/checkpoint-9"}, "run/checkpoint-9"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
@pytest.mark.filterwarnings("ignore")
def test_a_misuse(trainer, tmp_path, name):
    options, given, says = MISUSES[name]
    model = tiny_model()
    built = {"optimizers": given["optimizers"](model)} if "optimizers" in given else {}
    train = given["train"]() if "train" in given else None
    with pytest.raises(ValueError, match=says):
        trainer(model=model, train=train, **built, **options).train(resume_from_checkpoint=given.get("resume"))
    assert {path for path, what in seen(tmp_path).items() if what != "folder"} == set()
