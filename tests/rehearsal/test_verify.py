"""What a rehearsal's records must show: a good run passes every check, and a single fault fails the one check for it."""

import copy
import math

import pytest

from trainer_ext.rehearsal.launch import Asked
from trainer_ext.rehearsal.verify import verify

WHOLE = 0.52  # of the parameters: half, and the small ones that every rank keeps
EXPORT = {"files": {"model.safetensors": "ab12"}, "tensors": 25, "wrong": []}
PLAIN = [
    "one run",
    "engine",
    "trained",
    "losses equal on all ranks",
    "checkpoint saved and resumed",
    "weights exported",
]
ENGINES = {
    "ddp": (Asked("ddp"), {"engine": "DistributedDataParallel"}, PLAIN),
    "zero0": (Asked("deepspeed", 0), {"engine": "DeepSpeedEngine", "stage": 0}, PLAIN),
    "zero2": (
        Asked("deepspeed", 2),
        {"engine": "DeepSpeedEngine", "stage": 2, "optimizer_fraction": 0.5},
        [*PLAIN[:2], "optimizer state sharded", *PLAIN[2:]],
    ),
    "zero3, offloaded": (
        Asked("deepspeed", 3, ("optimizer", "parameters")),
        {
            "engine": "DeepSpeedEngine",
            "stage": 3,
            "local_fraction": WHOLE,
            "optimizer_fraction": 0.5,
            "offload": {"optimizer": "cpu", "parameters": "nvme"},
        },
        [*PLAIN[:2], "parameters sharded", "optimizer state sharded", "offload", *PLAIN[2:]],
    ),
    "fsdp2": (
        Asked("fsdp"),
        {"engine": "FSDPBertModel", "placements": ["(Shard(dim=0),)"], "local_fraction": 0.5, "optimizer_fraction": 0.5},
        [*PLAIN[:2], "parameters sharded", "optimizer state sharded", *PLAIN[2:]],
    ),
}  # fmt: skip


def rank_record(rank, runs_on, steps=(1, 2)):
    whole = {"stage": None, "world_size": 2, "local_fraction": 1.0, "optimizer_fraction": 1.0, "offload": None}
    return {
        "rank": rank,
        "runs_on": {**whole, "placements": [], **runs_on},
        "losses": [0.7 / step for step in steps],
        "grad_norms": [2.5 / step for step in steps],
        "steps": len(steps),
        "moved": True,
    }


def records(name):
    """The arguments of `verify` after a good rehearsal."""
    asked, runs_on, _ = ENGINES[name]
    return {
        "asked": asked,
        "processes": 2,
        "world_size": 2,
        "steps": 2,
        "trained": [rank_record(rank, runs_on) for rank in (0, 1)],
        "resumed": [rank_record(rank, runs_on, steps=(2,)) for rank in (0, 1)],
        "export": copy.deepcopy(EXPORT),
    }


def failed(found):
    return [check.name for check in verify(**found) if not check.held]


@pytest.mark.parametrize("name", ENGINES)
def test_a_good_rehearsal_passes(name):
    checks = verify(**records(name))
    assert [check.name for check in checks] == ENGINES[name][2]
    assert all(check.held for check in checks)
    assert all(check.seen for check in checks)


def on_all(found, run="trained", **values):
    for rank in found[run]:
        rank["runs_on"].update({name: value for name, value in values.items() if name in rank["runs_on"]})
        rank.update({name: value for name, value in values.items() if name in rank})


# Each fault: the engine, what happens to the records, and the check and what it says.
FAULTS = {
    "a rank is missing": ("fsdp2", lambda r: r["trained"].pop(), "one run", "1 process(es) of 2"),
    "two single runs": ("fsdp2", lambda r: on_all(r, world_size=1), "one run", "in a world of 1"),
    "two single runs of DDP": ("ddp", lambda r: on_all(r, world_size=1), "one run", "in a world of 1"),
    "two worlds": ("zero2", lambda r: r["trained"][1]["runs_on"].update(world_size=1), "one run", "a world of 1, 2"),
    "another world": ("zero2", lambda r: r.update(world_size=4), "one run", "in a world of 2"),
    "FSDP became DDP": (
        "fsdp2", lambda r: on_all(r, engine="DistributedDataParallel", placements=[]),
        "engine", "asked for fsdp; ran on DistributedDataParallel",
    ),
    "FSDP became DDP on one rank": (
        "fsdp2", lambda r: r["trained"][1]["runs_on"].update(engine="DistributedDataParallel", placements=[]),
        "engine", "asked for fsdp",
    ),
    "DeepSpeed became DDP": (
        "zero2", lambda r: on_all(r, engine="DistributedDataParallel", stage=None),
        "engine", "asked for deepspeed, ZeRO stage 2; ran on DistributedDataParallel",
    ),
    "stage 3 became 2": (
        "zero3, offloaded", lambda r: on_all(r, stage=2),
        "engine", "asked for deepspeed, ZeRO stage 3; ran on DeepSpeedEngine, ZeRO stage 2",
    ),
    "DDP became nothing": ("ddp", lambda r: on_all(r, engine="BertModel"), "engine", "ran on BertModel"),
    "FSDP sharded nothing": (
        "fsdp2", lambda r: on_all(r, local_fraction=1.0), "parameters sharded", "holds 1.000, 1.000 of the parameters"
    ),
    "one rank holds all": (
        "zero3, offloaded", lambda r: r["trained"][1]["runs_on"].update(local_fraction=1.0),
        "parameters sharded", "0.520, 1.000",
    ),
    "ZeRO-2 sharded nothing": (
        "zero2", lambda r: on_all(r, optimizer_fraction=1.0), "optimizer state sharded", "1.000 of the optimizer state"
    ),
    "no optimizer state": (
        "zero2", lambda r: on_all(r, optimizer_fraction=None), "optimizer state sharded", "holds none"
    ),
    "no offload": (
        "zero3, offloaded", lambda r: on_all(r, offload=None), "offload", "asked for optimizer, parameters; nothing"
    ),
    "half of the offload": (
        "zero3, offloaded", lambda r: on_all(r, offload={"optimizer": "cpu"}), "offload", "optimizer on cpu"
    ),
    "fewer steps": ("fsdp2", lambda r: on_all(r, steps=1), "trained", "1 of 2 steps"),
    "more steps": ("fsdp2", lambda r: on_all(r, steps=3), "trained", "3 of 2 steps"),
    "a NaN loss": ("fsdp2", lambda r: on_all(r, losses=[math.nan, 0.35]), "trained", "losses nan, 0.35"),
    "an infinite gradient": ("fsdp2", lambda r: on_all(r, grad_norms=[math.inf, 1.25]), "trained", "losses 0.7"),
    "the weights stood still": ("fsdp2", lambda r: on_all(r, moved=False), "trained", "weights did not move"),
    "they stood still on one rank": (
        "fsdp2", lambda r: r["trained"][1].update(moved=False), "trained", "weights did not move"
    ),
    "losses differ over the ranks": (
        "fsdp2", lambda r: r["trained"][1].update(losses=[0.7, 0.36]), "losses equal on all ranks", "0.36"
    ),
    "a NaN on one rank": (
        "fsdp2", lambda r: r["trained"][1].update(losses=[0.7, math.nan]), "losses equal on all ranks", "nan"
    ),
    "the resumed loss differs": (
        "fsdp2", lambda r: on_all(r, "resumed", losses=[0.35 * 1.001]), "checkpoint saved and resumed", "1.0e-03 apart"
    ),
    "the resumed gradient differs": (
        "fsdp2", lambda r: on_all(r, "resumed", grad_norms=[1.26]), "checkpoint saved and resumed", "7.9e-03 apart"
    ),
    "the resumed loss is NaN": (
        "fsdp2", lambda r: on_all(r, "resumed", losses=[math.nan]), "checkpoint saved and resumed", "inf apart"
    ),
    "it began anew": (
        "fsdp2", lambda r: on_all(r, "resumed", losses=[0.7, 0.35], grad_norms=[2.5, 1.25], steps=2),
        "checkpoint saved and resumed", "step 2 again",
    ),
    "the resumed run took no step": (
        "fsdp2", lambda r: on_all(r, "resumed", losses=[], grad_norms=[], steps=0),
        "checkpoint saved and resumed", "took no step",
    ),
    "the resumed run left nothing": (
        "fsdp2", lambda r: r.update(resumed=[]), "checkpoint saved and resumed", "took no step"
    ),
    "nothing exported": (
        "fsdp2", lambda r: r["export"].update(files={}, tensors=0, wrong=["a", "b"]), "weights exported", "wrote no"
    ),
    "other weights exported": (
        "fsdp2", lambda r: r["export"].update(wrong=["cls.bias", "cls.weight"]),
        "weights exported", "not the trained ones: cls.bias, cls.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_check_and_no_other(fault):
    name, happen, check, says = FAULTS[fault]
    found = records(name)
    happen(found)
    assert failed(found) == [check]
    assert says in next(one.seen for one in verify(**found) if not one.held)


def test_two_runs_that_agree_to_rounding_are_the_same():
    found = records("fsdp2")
    on_all(found, "resumed", losses=[0.35 * (1 + 2e-6)])
    assert failed(found) == []


def test_a_script_that_never_trains():
    checks = verify(**{**records("fsdp2"), "trained": [], "resumed": None, "export": None})
    assert [(check.name, check.held) for check in checks] == [("trained", False)]
    assert "without a finished Trainer.train()" in checks[0].seen


def test_a_rank_that_took_no_step_fails_without_breaking():
    found = records("zero3, offloaded")
    for rank in found["trained"]:
        del rank["runs_on"]
        rank.update(losses=[], grad_norms=[], steps=0, moved=None)
    assert {"one run", "engine", "parameters sharded", "offload", "trained"} <= set(failed(found))


def test_what_was_not_asked_for_is_not_checked():
    found = records("fsdp2")
    names = [check.name for check in verify(**{**found, "resumed": None, "export": None})]
    assert names == ENGINES["fsdp2"][2][:-2]


def test_one_process_shards_nothing():
    found = records("fsdp2")
    on_all(found, world_size=1, local_fraction=1.0, optimizer_fraction=1.0)
    found.update(processes=1, world_size=1, trained=found["trained"][:1], resumed=found["resumed"][:1])
    assert failed(found) == []


@pytest.mark.parametrize(("asked", "held"), [("ddp", True), ("single", True), ("fsdp", False), ("deepspeed", False)])
def test_one_plain_process(asked, held):
    found = records("ddp")
    on_all(found, world_size=1, engine="BertModel")
    found.update(asked=Asked(asked), processes=1, world_size=1, trained=found["trained"][:1])
    assert failed(found) == ([] if held else ["engine"])
