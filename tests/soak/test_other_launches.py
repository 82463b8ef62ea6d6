"""What the core tests prove of a launch, on the launchers, engines and optimizers that they leave out."""

import json

import pytest

from tests.optim import test_engines
from tests.parity.test_launched_modes import parity_run
from tests.test_launches import ACCELERATE, AUTO, TORCHRUN, at_the_root, check_ddp, script  # noqa: F401  (a fixture)
from tests.test_launches import pytestmark as without_accelerator

pytestmark = [pytest.mark.soak, without_accelerator]


def test_ddp_of_accelerate_is_one_run_of_two_ranks(tmp_path):
    check_ddp([*ACCELERATE, "fsdp_configs/ddp.yaml"], tmp_path)


def test_every_group_keeps_its_rate_and_decay_in_an_optimizer_on_the_host(tmp_path):
    test_engines.check("zero2_offload", tmp_path, "DeepSpeedEngine", 2, "DeepSpeedCPUAdam")


def test_the_groups_are_in_the_optimizer_that_deepspeed_builds(tmp_path):
    own = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    config = tmp_path / "optimizer.json"
    config.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 2}, "optimizer": own}))
    first, second = script(TORCHRUN, tmp_path, "--deepspeed", config, "--weight_decay", "0.25")
    assert first == second
    on = first["runs_on"]
    assert (on["engine"], on["stage"], on["world_size"], on["optimizer"]) == ("DeepSpeedEngine", 2, 2, "AdamW")
    assert 0.4 < on["optimizer_fraction"] < 0.6
    assert first["weight_decay"] == [0.25, 0.0]
    decay, no_decay = first["groups"]
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= set(decay)
    assert {"classifier.bias", "bert.embeddings.LayerNorm.weight"} <= set(no_decay)
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decay)
    assert all(name.endswith("bias") or "LayerNorm" in name for name in no_decay)
    assert len(decay) + len(no_decay) == 25


def test_fsdp2_with_muon(tmp_path):
    words = ["--optim", "muon", "--layerwise-lr-decay", "0.5", "--learning-rate", "1e-3"]
    code, rows = parity_run(tmp_path, "--modes", "fsdp2", *words)
    row = rows["fsdp2"]
    assert (code, row["verdict"]) == (0, "equal"), row
    assert row["runs_on"]["engine"] == "FSDPBertForSequenceClassification"
    assert 0.45 < row["runs_on"]["local_fraction"] < 0.55
