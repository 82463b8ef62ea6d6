"""Gradual unfreezing on two ranks of DDP and of FSDP2: the run by hand on one, and a resume in the middle of it."""

import json
from pathlib import Path

import pytest

from trainer_ext.rehearsal.processes import free_port, run_launch

ROOT = Path(__file__).parents[2]
LEVELS = [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], *[[0, 1, 2, 3]] * 3]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(out, launcher, *arguments, plan=None, words=()):
    port = "--main_process_port" if launcher[0] == "accelerate" else "--master_port"
    typed = [
        *launcher,
        port,
        str(free_port()),
        "-m",
        *words,
        "tests.callbacks.unfreezing_worker",
        str(out),
        *arguments,
    ]
    return run_launch(typed, out / "log", processes=2, timeout=300, plan=plan)


def check(out):
    """That both ranks trained as by hand; what they ran on."""
    first, second = (json.loads((out / f"seen{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["moves"] == [[levels, True] for levels in LEVELS]
    assert all(gap < 1e-12 for gap in first["gaps"])
    assert first["norms"] == pytest.approx(first["expected_norms"], rel=1e-12)
    assert first["adam_steps"] == first["resumed_adam_steps"] == [[0, 9], [1, 7], [2, 5], [3, 3]]
    assert first["resumed"] == [0] * 7
    return first["runs_on"]


def test_ddp(tmp_path):
    code, output = launch(tmp_path, ["torchrun", "--nproc_per_node", "2"])
    assert code == 0, output[-5000:]
    on = check(tmp_path)
    assert (on["engine"], on["world_size"]) == ("DistributedDataParallel", 2)


def test_fsdp2(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    launcher = ["accelerate", "launch", "--config_file", "fsdp_configs/fsdp2.yaml"]
    code, output = launch(tmp_path, launcher, plan=plan, words=["trainer_ext.rehearsal.process", "-m"])
    assert code == 0, output[-5000:]
    on = check(tmp_path)
    assert (on["engine"], on["world_size"]) == ("FSDPBertForSequenceClassification", 2)
    assert on["placements"] == ["(Shard(dim=0),)"]
    assert 0.45 < on["local_fraction"] < 0.55


def test_deepspeed_is_refused(tmp_path):
    code, output = launch(tmp_path, ["torchrun", "--nproc_per_node", "1"], "ds_configs/zero2.json")
    assert code != 0
    assert "GradualUnfreezing: DeepSpeed steps a group of parameters as one flat tensor. Train in stages" in output
    assert not list(tmp_path.glob("run/checkpoint-*"))
