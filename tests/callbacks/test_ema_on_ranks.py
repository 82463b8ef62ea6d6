"""Averages on two ranks of DDP and of FSDP2, in float64: each rank averages what it holds."""

from tests.callbacks.ema_ranks import check
from tests.callbacks.processes import FSDP2
from tests.callbacks.ranks import on_two_ranks


def test_ddp(tmp_path):
    ranks = on_two_ranks("ema_worker.py", tmp_path)
    check(ranks, tolerance=1e-14, shards=False)
    assert ranks[0]["runs_on"]["engine"] == "DistributedDataParallel"
    assert ranks[0]["runs_on"]["world_size"] == 2


def test_fsdp2(tmp_path):
    ranks = on_two_ranks("ema_worker.py", tmp_path, environment=FSDP2)
    check(ranks, tolerance=1e-14, shards=True)
    on = ranks[0]["runs_on"]
    assert (on["engine"], on["world_size"]) == ("FSDPBertForSequenceClassification", 2)
    assert on["placements"] == ["(Shard(dim=0),)"]
    assert 0.45 < on["local_fraction"] < 0.55
