"""Averages on two ranks of DeepSpeed, of its float32 masters: each rank averages its partition."""

from pathlib import Path

import pytest

from tests.callbacks.ema_ranks import check
from tests.callbacks.ranks import on_two_ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(tmp_path, stage):
    ranks = on_two_ranks("ema_worker.py", tmp_path, CONFIGS / f"zero{stage}.json")
    check(ranks, tolerance=2e-7, shards=True)
    on = ranks[0]["runs_on"]
    assert (on["engine"], on["stage"], on["world_size"]) == ("DeepSpeedEngine", stage, 2)
    assert 0.45 < on["optimizer_fraction"] < 0.55
    if stage == 3:
        assert 0.45 < on["local_fraction"] < 0.55
