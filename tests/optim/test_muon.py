"""Muon and AdamW behind one optimizer are each what torch makes of them alone."""

import copy

import pytest
import torch

from tests.conftest import tiny_model
from trainer_ext.optim.groups import assign, groups
from trainer_ext.optim.muon import MuonWithAdamW, with_muon

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def split(model, **options):
    return with_muon(assign(model, weight_decay=0.1, **options), model)


def learn(model, *optimizers, steps=2):
    ids = torch.arange(5, 21).reshape(2, 8) % 40
    model.eval()
    for _ in range(steps):
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_the_split():
    model = tiny_model()
    hidden = {row.name for row in split(model) if row.settings["use_muon"]}
    assert hidden == {name for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2}


def test_it_is_torchs_two_optimizers():
    model, other = tiny_model(), tiny_model()
    learn(model, MuonWithAdamW(groups(split(model, layerwise_lr_decay=0.5), lr=0.01), lr=0.01))
    rows = split(other, layerwise_lr_decay=0.5)
    muon = groups([row for row in rows if row.settings["use_muon"]], lr=0.01)
    adamw = groups([row for row in rows if not row.settings["use_muon"]], lr=0.01)
    learn(other, torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw))
    start = tiny_model()
    for (name, ours), theirs, before in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert name.endswith("key.bias") or not torch.equal(ours, before), name


def test_a_checkpoint_goes_on_where_it_was():
    whole, model = tiny_model(), tiny_model()
    learn(whole, MuonWithAdamW(groups(split(whole)), lr=0.01), steps=4)
    optimizer = MuonWithAdamW(groups(split(model)), lr=0.01)
    learn(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = MuonWithAdamW(groups(split(model)), lr=0.5)
    resumed.load_state_dict(saved)
    learn(model, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_schedule_drives_both():
    model = tiny_model()
    optimizer = MuonWithAdamW(groups(split(model)), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.0, total_iters=10)
    before = copy.deepcopy(model.state_dict())
    learn(model, optimizer)
    schedule.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="do not say use_muon"):
        MuonWithAdamW([{"params": list(tiny_model().parameters())}])
    with pytest.raises(ValueError, match="no trainable matrix"):
        split(torch.nn.Linear(2, 2))
