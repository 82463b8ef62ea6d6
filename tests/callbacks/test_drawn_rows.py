"""The rows of a batch, told afterwards, are those that the loader gave."""

import pytest
import torch
from torch.utils.data import WeightedRandomSampler
from transformers import Trainer

from tests.conftest import rows
from trainer_ext import TokenBudgetBatches, WeightedOrder
from trainer_ext.callbacks.drawn_rows import rows_of_batch


def given(run, epochs):
    """The token ids of every batch of every epoch, as training draws them."""
    loader = run.get_train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found.append([batch["input_ids"].tolist() for batch in loader])
    return loader, found


CASES = {
    "shuffled": {},
    "sequential": {"train_sampling_strategy": "sequential"},
    "workers": {"dataloader_num_workers": 1},
    "drawn": {"sampler": lambda count: WeightedOrder([1.0] * count, seed=3)},
    "batches": {"sampler": lambda count: TokenBudgetBatches([8] * count, 40, seed=3, round_to=1)},
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_that_were_given(trainer, case):
    options = dict(CASES[case])
    table = rows(22)
    if make := options.pop("sampler", None):
        options["train_sampler"] = make(len(table))
    run = trainer(train=table, per_device_train_batch_size=4, **options)
    loader, epochs = given(run, 2)
    told = [[rows_of_batch(loader, epoch, i) for i in range(len(epochs[epoch]))] for epoch in (0, 1)]
    for epoch in (0, 1):
        assert [[table[row]["input_ids"] for row in batch] for batch in told[epoch]] == epochs[epoch]
    if case != "sequential":
        assert told[0] != told[1]  # the mutation: another epoch's order would be seen
    assert rows_of_batch(loader, 0, len(epochs[0])) is None


def test_asking_does_not_move_the_order(trainer):
    run = trainer(train=rows(22), per_device_train_batch_size=4)
    loader = run.get_train_dataloader()
    loader.set_epoch(0)
    asked = []
    for number, batch in enumerate(loader):
        rows_of_batch(loader, 0, number)
        asked.append(batch["input_ids"].tolist())
    loader, (first,) = given(trainer(train=rows(22), per_device_train_batch_size=4), 1)
    assert asked == first


def test_what_cannot_be_told(trainer):
    stream = trainer(train=rows(22).to_iterable_dataset())
    assert rows_of_batch(stream.get_train_dataloader(), 0, 0) is None

    class Weighted(Trainer):
        def _get_train_sampler(self, *args):
            return WeightedRandomSampler(torch.ones(22).tolist(), 22)

    assert rows_of_batch(trainer(Weighted).get_train_dataloader(), 0, 0) is None
