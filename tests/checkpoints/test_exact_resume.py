"""A run that goes on from a checkpoint is the run that was not interrupted, from every step, to the bit."""

import json
import os
import random
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from tests.callbacks.processes import run_ranks
from tests.checkpoints import resumes
from tests.checkpoints.resumes import STEPS, VARIANTS, Augmented, Ours, Stock, Stream, differences, resumed, whole
from tests.conftest import rows
from trainer_ext import samplers
from trainer_ext.checkpoints.exact import RESUME, read_place
from trainer_ext.seeded_data import seed_data

# Two epochs begin at steps 4 and 8; a checkpoint of these steps precedes its epoch's end.
SAMPLED = {
    "random rows, 2 persistent workers": (4, 6),
    "random rows": (5,),
    "random transform of datasets": (5,),
    "collator with its generator": (5,),
    "random stream, read again": (6, STEPS),
    "logged every 5 steps": (3, 7),
    "logged every epoch": (4, 6),
    "group_by_length": (6,),
    "batch_rebalance": (6,),
    "weighted": (6,),
    "class-balanced": (6,),
    "token budget": (6,),
    "saved every epoch": (4,),
    "ends inside an epoch": (8, 10),
    "reduce_lr_on_plateau": (8,),
    "EMACallback": (4,),
    "EarlyStopping": (8,),
    "GradualUnfreezing": (5,),
    "NonFiniteGuard, GroupNorms": (5,),
}

NEIGHBOURS = ("dropout, shuffling", "evaluated every 3 steps")


def test_from_every_step(tmp_path):
    variant = VARIANTS["evaluated every epoch"]
    expected = whole(Ours, variant, tmp_path / "run")
    assert len(expected["seen"]) == STEPS
    assert [len(expected["seen"][step]) for step in range(4)] == [2, 2, 2, 1], "the tail of an epoch is ragged"
    for epoch in range(3):
        drawn = [row for step in range(4) for ids, _ in expected["seen"][4 * epoch + step] for row in ids]
        assert sorted(drawn) == list(range(resumes.ROWS))
    for step in range(1, STEPS + 1):
        assert differences(expected, resumed(Ours, variant, tmp_path / "run", step), step) == [], step
    # What is compared can differ: from another step, it does.
    assert differences(expected, resumed(Ours, variant, tmp_path / "run", 2) | {"seen": {}}, 2) == ["seen"]


@pytest.mark.parametrize("name", SAMPLED)
def test_from_some_steps(tmp_path, name):
    expected = whole(Ours, VARIANTS[name], tmp_path / "run")
    for step in SAMPLED[name]:
        assert differences(expected, resumed(Ours, VARIANTS[name], tmp_path / "run", step), step) == [], step


def test_without_the_seeding_random_rows_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "seed_data", lambda *args, **options: None)
    expected = whole(Ours, VARIANTS["random rows"], tmp_path / "run")
    found = resumed(Ours, VARIANTS["random rows"], tmp_path / "run", 5)
    assert differences(expected, found, 5) == ["weights", "seen", "log"]


def test_the_stock_class_differs_by_length_after_an_epoch(tmp_path):
    expected = whole(Stock, VARIANTS["group_by_length"], tmp_path / "run")
    found = resumed(Stock, VARIANTS["group_by_length"], tmp_path / "run", 6)
    assert differences(expected, found, 6) == ["weights", "seen", "log"]


@pytest.mark.parametrize(
    ("change", "name", "step"),
    [({"epoch_ended": True}, "EarlyStopping", 4), ({"losses_since": [0.0]}, "logged every 5 steps", 3)],
)
def test_each_thing_that_is_carried_is_needed(tmp_path, change, name, step):
    expected = whole(Ours, VARIANTS[name], tmp_path / "run")
    folder = tmp_path / "run" / f"checkpoint-{step}"
    for other in tmp_path.glob("run/checkpoint-*/manifest.json"):
        other.unlink()
    (folder / RESUME).write_text(json.dumps({**read_place(folder), **change}))
    assert "log" in differences(expected, resumed(Ours, VARIANTS[name], tmp_path / "run", step), step)


@pytest.mark.parametrize("cls", [Ours, Stock])
def test_a_training_is_the_same_with_and_without_evaluations(tmp_path, cls):
    """Not so with the stock class, whose evaluations move the dropout."""
    without, within = (whole(cls, VARIANTS[name], tmp_path / str(len(name))) for name in NEIGHBOURS)
    assert (without["weights"] == within["weights"]) == (cls is Ours)


def test_a_run_that_ended_inside_an_epoch_goes_on_in_it(tmp_path):
    """Given more steps, whether its last checkpoint was saved before or at the end of the part of an epoch."""
    variant = replace(VARIANTS["random rows"], options={"lr_scheduler_type": "constant"})
    expected = whole(Ours, variant, tmp_path / "whole")
    for strategy in ("steps", "epoch"):
        short = replace(variant, options={**variant.options, "save_strategy": strategy, "max_steps": 6})
        whole(Ours, short, tmp_path / strategy)
        found = resumed(Ours, variant, tmp_path / strategy, 6)
        assert differences(expected, found, 6) == [], strategy


def generators():
    """The states of the global random generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def batches(data, *, epoch=0, seed=1, collate=resumes.masked, **options):
    loader = DataLoader(data, 3, collate_fn=collate, **options)
    seed_data(loader, seed=seed, epoch=epoch)
    return [batch["input_ids"].tolist() for batch in loader]


def test_rows_are_the_same_wherever_they_are_fetched():
    expected = batches(Augmented())
    state = generators()
    assert batches(Augmented()) == expected
    assert generators() != state, "base seed"
    assert batches(Augmented(), num_workers=2) == expected
    assert batches(Augmented(), epoch=1) != expected
    assert batches(Augmented(), seed=2) != expected
    stream = batches(Stream())
    assert batches(Stream()) == stream
    assert batches(Stream(), epoch=1) != stream


def test_a_fetch_leaves_the_global_generators_alone():
    loader = DataLoader(Augmented(), 3, collate_fn=resumes.masked)
    seed_data(loader, seed=1, epoch=0)
    fetch = iter(loader)
    before = generators()
    next(fetch)
    assert generators() == before


def test_rows_in_which_nothing_is_random_are_not_seeded():
    table = rows(6)
    transformed = rows(6)
    transformed.set_transform(lambda batch: batch)
    cases = [(table, default_data_collator, False), (transformed, default_data_collator, True),
             (table, resumes.masked, True), (Augmented(), default_data_collator, True)]  # fmt: skip
    for data, collate, seeded in cases:
        loader = DataLoader(data, 3, collate_fn=collate)
        seed_data(loader, seed=1, epoch=0)
        assert (loader.dataset is not data) == seeded
        assert len(list(loader)) == -(-len(data) // 3)


STREAMS = {  # made of a plain one, and whether they are seeded
    "plain": (lambda plain: plain, False),
    "shuffled": (lambda plain: plain.shuffle(seed=0, buffer_size=4).skip(1).take(9), False),
    "of a generator": (lambda plain: datasets.IterableDataset.from_generator(lambda: iter(rows(12))), True),
    "mapped": (lambda plain: plain.map(lambda row: row), True),
    "filtered, then shuffled": (lambda plain: plain.filter(lambda row: True).shuffle(seed=0, buffer_size=4), True),
    "joined": (lambda plain: datasets.concatenate_datasets([plain, plain]), True),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_in_which_nothing_is_random_are_not_seeded(name):
    make, seeded = STREAMS[name]
    data = make(rows(12).to_iterable_dataset(num_shards=3))
    loader = DataLoader(data, 3, collate_fn=default_data_collator)
    seed_data(loader, seed=1, epoch=0)
    assert (loader.dataset is not data) == seeded

    def drawn():
        fetch = iter(loader)  # which draws the workers' seed
        before = generators()
        found = [batch["input_ids"].tolist() for batch in fetch]
        assert generators() == before
        return found

    torch.manual_seed(0)
    first = drawn()
    np.random.seed(7)
    assert drawn() == first
    assert len(first) >= 3


def test_workers_that_live_on_hear_of_the_epoch():
    loader = DataLoader(Augmented(), 3, collate_fn=resumes.masked, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        seed_data(loader, seed=1, epoch=epoch)
        assert [batch["input_ids"].tolist() for batch in loader] == batches(Augmented(), epoch=epoch)


def ranks_resume(out):
    from accelerate.state import AcceleratorState, GradientState

    from trainer_ext.engine import runs_on

    variant = VARIANTS["random rows"]
    seen = {"whole": whole(Ours, variant, out)}
    seen["differences"] = {}
    for step in (1, 3, 5):
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        made = resumed(Ours, variant, out, step)
        seen["differences"][step] = differences(seen["whole"], made, step)
    made = resumes.make(Ours, variant, out, max_steps=1)
    made.train()
    on = runs_on(made)
    return seen | {"on": (on.engine, on.world_size, os.environ["RANK"])}


def test_two_ranks(tmp_path):
    first, second = run_ranks(ranks_resume, 2, str(tmp_path / "run"))
    assert first["on"] == ("DistributedDataParallel", 2, "0")
    assert second["on"] == ("DistributedDataParallel", 2, "1")
    assert first["differences"] == second["differences"] == {1: [], 3: [], 5: []}
    assert first["whole"]["weights"] == second["whole"]["weights"]
    assert first["whole"]["seen"] != second["whole"]["seen"], "each rank has rows of its own"
    assert len(read_place(tmp_path / "run" / "checkpoint-5")["losses_since"]) == 2
