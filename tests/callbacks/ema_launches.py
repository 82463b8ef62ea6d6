"""Launches of `ema_worker.py`, and what has to hold of what its ranks saw, on every engine."""

import json
from pathlib import Path

import pytest

from trainer_ext.rehearsal.processes import free_port, run_launch

ROOT = Path(__file__).parents[2]


def launch(out, *, config=None, fsdp=False):
    """What each of two ranks saw on DDP, on the DeepSpeed of a config, or on FSDP2."""
    port, plan = str(free_port()), None
    words = ["torchrun", "--nproc_per_node", "2", "--master_port", port]
    if fsdp:
        plan = out / "plan.json"
        plan.write_text("{}")
        words = ["accelerate", "launch", "--config_file", "fsdp_configs/fsdp2.yaml", "--main_process_port", port]
        words += ["-m", "trainer_ext.rehearsal.process"]
    words += ["-m", "tests.callbacks.ema_worker", str(out), *([config] if config else [])]
    code, output = run_launch(words, out / "log", processes=2, timeout=300, plan=plan)
    assert code == 0, output[-5000:]
    return [json.loads((out / f"seen{rank}.json").read_text()) for rank in (0, 1)]


def check(ranks, *, tolerance, shards):
    """That both ranks averaged, evaluated, saved and resumed as the oracle does."""
    first, second = ranks
    assert first == {**second, "held": first["held"]}
    parts = ["ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors"]
    assert first["files"] == (parts if shards else ["ema.safetensors"])
    for rank in ranks:
        assert 0.45 < rank["held"] < 0.55 if shards else rank["held"] == 1
    gaps, lost = first["gaps"], first["mutated"]
    assert len(gaps["evaluated"]) == 2
    assert all(gap < tolerance for gap in [*gaps["evaluated"], gaps["final"]])
    assert all(gap > 1e-3 for gap in [*lost["evaluated"], lost["final"], gaps["weights"]])
    assert lost["untouched"] == 0
    assert first["final_eval_loss"] == first["eval_losses"][-1]
    assert first["resumed"] == {"averages": 0, "weights": 0, "taken up": 0}
    best = first["best"]
    assert (best["step"], best["eval_losses"], best["losses"]) == (2, first["eval_losses"], first["losses"])
    assert best["eval_losses"][0] > best["eval_losses"][1]
    assert best["averages"] < tolerance
    lost_file = (
        f"has {parts[0]} of as many ranks, and this run needs {parts[1]}" if shards else "has no ema.safetensors"
    )
    assert lost_file in first["refused"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
