"""`NonFiniteGuard` under every engine: bitwise what a run by hand gives that leaves the bad steps out."""

import pytest

from tests.callbacks import guard_run
from tests.callbacks.guard_run import BAD_STEPS, STEPS, run_all
from tests.callbacks.processes import run_ranks

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
AUTO = {
    name: "auto"
    for name in (
        "gradient_clipping",
        "gradient_accumulation_steps",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    )
}


def zero(stage, **more):
    return {**AUTO, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}, **more}


UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
ENGINES = {
    "single": ("BertForSequenceClassification", None),
    "ddp": ("DistributedDataParallel", None),
    "fsdp2": ("FSDPBertForSequenceClassification", None),
    "zero2": ("DeepSpeedEngine", 2),
    "zero2 bf16 unchecked": ("DeepSpeedEngine", 2),
    "zero3": ("DeepSpeedEngine", 3),
}


@pytest.fixture(scope="module")
def found():
    """Of each engine what its ranks saw."""
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    return {
        "single": [run_all()],
        "ddp": run_ranks(run_all, 2),
        "fsdp2": run_ranks(run_all, 2, environment=FSDP2),
        "zero2": run_ranks(run_all, 2, zero(2), environment=deepspeed),
        "zero2 bf16 unchecked": run_ranks(run_all, 2, zero(2, **UNCHECKED), environment=deepspeed),
        "zero3": run_ranks(run_all, 2, zero(3), environment=deepspeed),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_it_ran_on_the_engine(found, engine):
    name, stage = ENGINES[engine]
    for rank in found[engine]:
        for run in rank.values():
            on = run["runs_on"]
            assert (on["engine"], on["stage"], on["world_size"]) == (name, stage, len(found[engine]))
            if engine in ("fsdp2", "zero3"):
                assert 0.45 < on["local_fraction"] < 0.6


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_without_the_bad_steps(found, engine):
    for rank in found[engine]:
        skipped, by_hand = rank["skipped"], rank["by hand"]
        assert skipped["error"] is None
        good = [0, *(step for step in range(1, STEPS + 1) if step not in BAD_STEPS)]
        for kept in ("weights", "states", "rates"):
            for step in BAD_STEPS:
                assert skipped[kept][step] == skipped[kept][step - 1], (kept, step)
            assert [skipped[kept][step] for step in good][1:] == by_hand[kept][1:], kept
        assert len(set(by_hand["weights"])) == len(set(by_hand["states"])) == len(good)  # every good step moved both
        assert skipped["skipped"] == len(BAD_STEPS)
        assert skipped["logged"] == [1, 1, 1, 2, 3, 3]
        assert skipped["marked"] == [step in BAD_STEPS for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["raised", "raised at the loss"])
def test_the_error_says_what_and_where(found, engine, kind):
    ranks = found[engine]
    for rank in ranks:
        raised = rank[kind]
        assert raised["error"] == ranks[0][kind]["error"]
        assert "of step 3 is not finite" in raised["error"]
        assert raised["weights"][-1] == raised["weights"][-2] == rank["without"]["weights"][2]
        assert raised["states"][-1] == raised["states"][-2] == rank["without"]["states"][2]
    error = ranks[0][kind]["error"]
    bad, place, number = ("rank 0", "5 in the batch", 5) if len(ranks) == 1 else ("rank 1", "1 in the batch", 5)
    assert f"{bad}: micro-batch 2 of 2 (batch {number} of epoch 0, from 0)" in error
    if len(ranks) == 2:
        assert "rank 0" not in error
    if kind == "raised":
        assert f"rows 45 of the dataset, {place}" in error
        assert "First parameter: bert.embeddings.word_embeddings.weight, " in error


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2 bf16 unchecked"])
def test_without_it_the_weights_are_lost(found, engine):
    for rank in found[engine]:
        assert not rank["without"]["finite"]
        assert rank["skipped"]["finite"]
        assert rank["raised"]["finite"]
