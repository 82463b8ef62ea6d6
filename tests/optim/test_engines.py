"""Rates, decay and state as the running engine has them, on two real ranks: no group may lose what it was given.

The rates are far apart, by factors of 4, and what each parameter moved says with which it was really stepped: two steps of
Adam go at least one rate far and at most one and a half, as the linear schedule halves the second.
"""

import json
import re
from pathlib import Path

import pytest

from tests.callbacks.processes import FSDP2
from tests.callbacks.ranks import run_script

CONFIGS = Path(__file__).parents[2] / "ds_configs"
RATE, DECAY = 2**-10, 0.25
KNOBS = {
    "learning_rate": RATE,
    "layerwise_lr_decay": 0.25,
    "head_lr_multiplier": 4,
    "weight_decay": DECAY,
    "max_grad_norm": 0,
    "lr_scheduler_type": "linear",
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
}
MULTIPLIERS = {"bert.embeddings": 1 / 16, "bert.encoder": 1 / 4, "bert.pooler": 1, "classifier": 4}
ENGINES = {
    "ddp": ("DistributedDataParallel", None, "AdamW"),
    "zero1": ("DeepSpeedEngine", 1, "AdamW"),
    "zero2": ("DeepSpeedEngine", 2, "AdamW"),
    "zero3": ("DeepSpeedEngine", 3, "AdamW"),
    "zero2 and its config's optimizer": ("DeepSpeedEngine", 2, "AdamW"),
    "fsdp2": ("FSDPBertForSequenceClassification", None, "AdamW"),
}


def run(engine, out, *more):
    """What both ranks saw."""
    words = ["--trainer", "custom", *more, "--output_dir", out]
    words += [word for name, value in KNOBS.items() for word in (f"--{name}", value)]
    if engine.startswith("zero"):
        words += ["--deepspeed", config_of(engine, out)]
    run_script("../rehearsal/launched.py", *words, environment=FSDP2 if engine == "fsdp2" else None)
    return [json.loads((out / f"seen{rank}.json").read_text()) for rank in (0, 1)]


def config_of(engine, out):
    """The path of a DeepSpeed config: one that is shipped, or ZeRO-2's with an optimizer in it."""
    name, _, own = engine.partition(" ")
    path = CONFIGS / f"{name}.json"
    if own:
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        config = json.loads(path.read_text()) | {"optimizer": {"type": "AdamW", "params": params}}
        path = out / "own.json"
        path.write_text(json.dumps(config))
    return path


def expected(name):
    """The multiplier of a parameter's rate, and its decay: by hand, for one block."""
    multiplier = next(value for prefix, value in MULTIPLIERS.items() if name.startswith(prefix))
    return multiplier, 0.0 if re.search(r"bias|LayerNorm", name) else DECAY


def wrongly_stepped(moved):
    """The parameters that did not move as their rate says; the keys' biases have no gradient but rounding."""
    rates = {name: RATE * expected(name)[0] for name in moved if not name.endswith("key.bias")}
    return {name for name, rate in rates.items() if not 0.9 * rate < moved[name] < 1.6 * rate}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_group_keeps_its_rate_and_decay(tmp_path, engine):
    check(engine, tmp_path, *ENGINES[engine])


def check(engine, out, wrapper, stage, optimizer):
    first, second = run(engine, out)
    on = first["runs_on"]
    assert (on["engine"], on["stage"], on["world_size"], on["optimizer"]) == (wrapper, stage, 2, optimizer)
    assert first["log"] == second["log"]
    fraction = 1.0 if engine == "ddp" else 0.5
    assert on["optimizer_fraction"] == pytest.approx(fraction, abs=0.1)

    grouped = zip(first["groups"], first["group_names"], first["initial_rates"], first["weight_decay"], strict=True)
    seen_names = []
    for members, group, rate, decay in grouped:
        assert members
        for name in members:
            multiplier, own_decay = expected(name)
            assert (rate, decay) == (RATE * multiplier, own_decay), name
        logged = [entry[f"learning_rate_{group}"] for entry in first["log"]]
        assert logged == pytest.approx([rate, rate / 2])
        seen_names += members
    assert sorted(seen_names) == sorted(first["moved"])

    assert not wrongly_stepped(first["moved"])


def test_a_lost_rate_is_seen(tmp_path):
    first, _ = run("ddp", tmp_path, "--fault", "one_rate")
    assert len(wrongly_stepped(first["moved"])) == len(first["moved"]) - 1  # all but the keys' bias
