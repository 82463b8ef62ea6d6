"""Gradual unfreezing on two ranks of DDP and of FSDP2: the run by hand on one, and a resume in the middle of it."""

from pathlib import Path

import pytest

from tests.callbacks.processes import FSDP2
from tests.callbacks.ranks import on_two_ranks

CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
LEVELS = [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], *[[0, 1, 2, 3]] * 3]


def check(ranks):
    """That both ranks trained as by hand; what they ran on."""
    first, second = ranks
    assert first == second
    assert first["moves"] == [[levels, True] for levels in LEVELS]
    assert all(gap < 1e-12 for gap in first["gaps"])
    assert first["norms"] == pytest.approx(first["expected_norms"], rel=1e-12)
    assert first["adam_steps"] == first["resumed_adam_steps"] == [[0, 9], [1, 7], [2, 5], [3, 3]]
    assert first["resumed"] == [0] * 7
    return first["runs_on"]


def test_ddp(tmp_path):
    on = check(on_two_ranks("unfreezing_worker.py", tmp_path))
    assert (on["engine"], on["world_size"]) == ("DistributedDataParallel", 2)


def test_fsdp2(tmp_path):
    on = check(on_two_ranks("unfreezing_worker.py", tmp_path, environment=FSDP2))
    assert (on["engine"], on["world_size"]) == ("FSDPBertForSequenceClassification", 2)
    assert on["placements"] == ["(Shard(dim=0),)"]
    assert 0.45 < on["local_fraction"] < 0.55


def test_deepspeed_is_refused(tmp_path):
    said = "GradualUnfreezing: DeepSpeed steps a group of parameters as one flat tensor. Train in stages"
    with pytest.raises(AssertionError, match=said):
        on_two_ranks("unfreezing_worker.py", tmp_path, CONFIG)
    assert not list(tmp_path.glob("run/checkpoint-*"))
