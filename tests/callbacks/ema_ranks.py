"""What has to hold of what the ranks of `ema_worker.py` saw, on every engine."""


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
