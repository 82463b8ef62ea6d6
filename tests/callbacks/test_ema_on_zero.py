"""Averages on two ranks of DeepSpeed, of its float32 masters: each rank averages its partition."""

import pytest

from tests.callbacks.ema_launches import at_the_root, check, launch  # noqa: F401  (a fixture)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(tmp_path, stage):
    ranks = launch(tmp_path, config=f"ds_configs/zero{stage}.json")
    check(ranks, tolerance=2e-7, shards=True)
    on = ranks[0]["runs_on"]
    assert (on["engine"], on["stage"], on["world_size"]) == ("DeepSpeedEngine", stage, 2)
    assert 0.45 < on["optimizer_fraction"] < 0.55
    if stage == 3:
        assert 0.45 < on["local_fraction"] < 0.55
