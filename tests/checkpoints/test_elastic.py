"""A run goes from engine to engine, and is the run that one process makes: the same weights, moments, samples, losses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.callbacks.processes import run_ranks
from tests.checkpoints.elastic_run import ENGINES, LABELS, STEPS, differing, leg, legs, make, seen_by_all
from tests.conftest import tiny_model
from trainer_ext.checkpoints import elastic
from trainer_ext.checkpoints.into_engine import put_weights
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.run_record import RunRecord, require_same_data
from trainer_ext.checkpoints.trusted import load
from trainer_ext.checkpoints.weights import Stored

TOLERANCE = 1e-6  # of a loss, relative: ranks add up in another order
# One process to step 2, then on two ranks: engine, last step.
LAUNCHES = ([("plain", 4), ("zero2", 5), ("zero3", 6)], [("fsdp2_sharded", 7)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process, without a break."""
    return leg("plain", tmp_path_factory.mktemp("whole"), STEPS)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Each leg's folder, its last step and what its ranks saw, in order."""
    out = tmp_path_factory.mktemp("chain")
    found = {"one": (out / "one", 2, [leg("plain", out / "one", 2)])}
    for launch in LAUNCHES:
        plans = []
        for engine, until in launch:
            before, step = (plans[-1][1], plans[-1][2]) if plans else list(found.values())[-1][:2]
            plans.append((engine, str(out / engine), until, str(Path(before) / f"checkpoint-{step}"), {}))
        environment = ENGINES[launch[0][0]][0]
        ranks = run_ranks(legs, 2, plans, environment=environment, timeout=240)
        for number, (engine, until) in enumerate(launch):
            found[engine] = (out / engine, until, [rank[number] for rank in ranks])
    return found


@pytest.fixture
def last(chain):
    """The checkpoint that the sharded FSDP2 leg left."""
    folder, step, _ = chain["fsdp2_sharded"]
    return folder / f"checkpoint-{step}"


def assert_goes_on(whole, before, after, ranks):
    assert differing(before / "end.safetensors", after / "begin.safetensors") == []
    for step, seen in seen_by_all(ranks).items():
        assert seen == sorted(whole["seen"][step])
        for rank in ranks:
            assert abs(rank["losses"][step] / whole["losses"][step] - 1) <= TOLERANCE


def test_a_run_goes_from_engine_to_engine(chain, whole, last, tmp_path):
    folders = [folder for folder, _, _ in chain.values()]
    for before, (after, _, ranks) in zip(folders, list(chain.values())[1:], strict=False):
        assert_goes_on(whole, before, after, ranks)
    ended = leg("plain", tmp_path, STEPS, str(last))
    assert_goes_on(whole, last.parent, tmp_path, [ended])
    assert set(ended["seen"]) == {8, 9}
    on = {engine: ranks[0]["on"] for engine, (_, _, ranks) in chain.items()}
    assert [o["world_size"] for o in on.values()] == [1, 2, 2, 2, 2]
    assert (ended["on"]["world_size"], ended["on"]["engine"]) == (1, "BertForSequenceClassification")
    assert on["plain"]["engine"] == "DistributedDataParallel"
    assert (on["zero2"]["stage"], on["zero3"]["stage"]) == (2, 3)
    assert 0.4 < on["zero2"]["optimizer_fraction"] < 0.6
    assert on["zero3"]["local_fraction"] < 0.7
    assert on["fsdp2_sharded"]["placements"] == ("(Shard(dim=0),)",)


def test_lost_moments_are_seen(chain, whole, last, tmp_path, monkeypatch):
    """The checks above, on a conversion that leaves them out."""
    real = elastic.put_moments

    def without_first_moments(model, optimizer, moments):
        real(model, optimizer, moments)
        for kept in elastic.base_optimizer(optimizer).state.values():
            kept["exp_avg"].zero_()

    monkeypatch.setattr(elastic, "put_moments", without_first_moments)
    ended = leg("plain", tmp_path, STEPS, str(last))
    wrong = differing(last.parent / "end.safetensors", tmp_path / "begin.safetensors")
    assert wrong
    assert {name.split()[0] for name in wrong} == {"exp_avg"}
    assert abs(ended["losses"][STEPS] / whole["losses"][STEPS] - 1) > 100 * TOLERANCE


ORDERED = {
    "lengths": {"train_sampling_strategy": "group_by_length"},
    "class-balanced": {"order": "class-balanced"},
    "weighted": {"order": "weighted"},
    "token budget": {"order": "token budget"},
}


def test_two_ranks_take_the_rows_that_one_process_left(tmp_path):
    wholes, plans = {}, []
    for name, options in ORDERED.items():
        wholes[name] = leg("plain", tmp_path / "whole" / name, 4, **options)
        leg("plain", tmp_path / name, 2, **options)
        plans.append(
            ("plain", str(tmp_path / "two" / name), 4, str(tmp_path / name / "checkpoint-2"), options | {"micro": 4})
        )
    for whole, ranks in zip(wholes.values(), zip(*run_ranks(legs, 2, plans), strict=True), strict=True):
        assert [rank["on"]["world_size"] for rank in ranks] == [2, 2]
        assert all(rank["seen"] for rank in ranks)
        assert seen_by_all(ranks) == {step: sorted(whole["seen"][step]) for step in (3, 4)}
        assert sorted(whole["seen"][3]) != sorted(whole["seen"][1])


REFUSED = {  # what is other than it was: options of the trainer, of the model; what the error says
    "fewer samples a step": (
        {"gradient_accumulation_steps": 1},
        {},
        "samples a step: 8, now 4), so that samples would be left out or trained twice. Set per_device_train_batch_size x "
        "gradient_accumulation_steps to 8 (8 samples a step over 1 ranks).",
    ),
    "another seed": ({"data_seed": 7}, {}, "(seed: 42, now 7)"),
    "another order": (
        {"train_sampling_strategy": "group_by_length"},
        {},
        "sampler: SeedableRandomSampler, now LengthGroupedOrder",
    ),
    "another optimizer": ({"optim": "sgd"}, {}, "optimizer: AdamW, now SGD"),
    "more is trained": ({"freeze": []}, {}, "bert.embeddings.position_embeddings.weight is in this run's alone"),
    "a larger model": (
        {},
        {"type_vocab_size": 3},
        "token_type_embeddings.weight is (2, 16) in the checkpoint and (3, 16) here",
    ),
    "a coarser model": ({}, {"dtype": torch.bfloat16}, "torch.float32) that are lost in this run's torch.bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(last, tmp_path, case):
    options, model, message = REFUSED[case]
    trainer = make("plain", tmp_path, STEPS, model=tiny_model(num_labels=LABELS, **model), **options)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(last))
    assert message in str(error.value)
    assert trainer.seen == {}
    assert list(tmp_path.iterdir()) == []
    assert verify(last) == []


def test_the_best_checkpoint_of_another_engine_gives_its_weights(last, tmp_path):
    trainer = make("plain", tmp_path, 1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(last)
    trainer._load_best_model()
    saved = load_file(last.parent / "end.safetensors")
    live = trainer.model.state_dict()
    assert live
    assert all(torch.equal(tensor, saved[f"weight {name}"]) for name, tensor in live.items())


def test_one_process_takes_up_the_random_state_of_the_first_of_two(last, tmp_path):
    trainer = make("plain", tmp_path, 1)
    saved = load(last / "rng_state_0.pth")["cpu"]
    assert not torch.equal(torch.get_rng_state(), saved)
    trainer._load_rng_state(str(last))
    assert torch.equal(torch.get_rng_state(), saved)


def test_tied_weights_are_stored_once():
    torch.manual_seed(0)
    saved, live = (Tied() for _ in range(2))
    weights = {"head.weight": Stored(torch.Size((5, 3)), torch.float32, saved.head.weight.detach)}
    put_weights(live, torch.optim.SGD(live.parameters()), weights)
    assert torch.equal(live.embedding.weight, saved.head.weight)
    assert live.head.weight is live.embedding.weight


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_samples_that_the_ranks_cannot_share():
    saved, now = (RunRecord("DDP", ranks, 1, {"samples a step": rows}) for ranks, rows in ((2, 8), (3, 9)))
    with pytest.raises(
        ValueError, match="3 ranks cannot share 8 samples a step: take a number of processes that divides it"
    ):
        require_same_data(saved, now, Path("checkpoint-1"))
