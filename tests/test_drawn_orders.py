"""Orders by shares, by weights and by a budget of tokens: the same for every number of ranks, and from every stop on."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from tests.conftest import rows
from trainer_ext import ClassBalancedOrder, ExactLossMixin, TokenBudgetBatches, WeightedOrder
from trainer_ext.samplers import tell_epoch

LABELS = [0] * 60 + [1] * 12 + [2] * 4
LENGTHS = np.random.default_rng(3).integers(1, 200, 301).tolist()
WEIGHTS = np.random.default_rng(4).exponential(size=76) * (np.arange(76) % 9 > 0)

ORDERS = {
    "classes": lambda seed=7: ClassBalancedOrder(LABELS, seed=seed),
    "shares": lambda seed=7: ClassBalancedOrder(LABELS, {0: 0.5, 1: 0.3, 2: 0.2}, seed=seed, rows=45),
    "weights": lambda seed=7: WeightedOrder(WEIGHTS, seed=seed),
    "tokens": lambda seed=7: TokenBudgetBatches(LENGTHS, 800, seed=seed),
}
SINGLE = [name for name in ORDERS if name != "tokens"]


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_depends_on_the_seed_and_the_epoch_alone(name):
    made = ORDERS[name]()
    torch.manual_seed(1)
    np.random.seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch_of(made, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert epoch_of(made, 3) != first
    assert epoch_of(made, 2) == first == epoch_of(ORDERS[name](), 2)
    assert epoch_of(ORDERS[name](seed=8), 2) != first


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SINGLE)
def test_the_ranks_together_draw_the_one_order(name, ranks):
    """accelerate's own shards in rank order, without the rows with which it fills the last round."""
    whole = epoch_of(ORDERS[name](), 1)
    shards = []
    for rank in range(ranks):
        sampler = ORDERS[name]()
        sampler.set_epoch(1)
        shards.append(list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), ranks, rank)))
    dealt = [i for batches in zip(*shards, strict=True) for batch in batches for i in batch]
    assert dealt[: len(whole)] == whole


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 2), (4, 1), (2, 1), (1, 2)])
def test_batches_of_tokens_are_dealt_out_whole(ranks, accumulation):
    def dealt(ranks, accumulation, multiple):
        shards = []
        for rank in range(ranks):
            sampler = ORDERS["tokens"]()
            sampler.deal(ranks=ranks, rank=rank, accumulation=accumulation)
            assert len(sampler.ends) % multiple == 0
            shards.append(epoch_of(sampler, 1))
        assert len({len(shard) for shard in shards}) == 1
        assert len(shards[0]) % accumulation == 0
        return list(chain(*zip(*shards, strict=True)))

    product = ranks * accumulation
    assert dealt(ranks, accumulation, product) == dealt(1, product, product)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_epoch_goes_on_from_every_stop(name, rank):
    data = Dataset.from_dict({"row": list(range(len(LENGTHS)))})

    def loader():
        sampler = ORDERS[name]()
        if name == "tokens":
            sampler.deal(ranks=2, rank=rank)
            shard = BatchSamplerShard(sampler, 1, 0)  # as the Trainer has it
        else:
            shard = BatchSamplerShard(BatchSampler(sampler, 8, drop_last=False), 2, rank)
        return DataLoaderShard(data, batch_sampler=shard)

    def drawn(loader, epoch=2):
        loader.set_epoch(epoch)
        tell_epoch(loader, epoch)
        return [batch["row"].tolist() for batch in loader]

    whole = drawn(loader())
    assert len(whole) >= 3
    for stop in range(len(whole)):
        assert drawn(skip_first_batches(loader(), stop)) == whole[stop:]


def per_class(drawn):
    return Counter(LABELS[i] for i in drawn)


@pytest.mark.parametrize("epoch", range(4))
def test_an_epoch_has_the_shares_that_were_asked_for(epoch):
    assert per_class(epoch_of(ORDERS["shares"](), epoch)) == {0: 23, 1: 13, 2: 9}  # 22.5, 13.5, 9 of 45
    assert per_class(epoch_of(ORDERS["classes"](), epoch)) == {0: 26, 1: 25, 2: 25}
    words = ClassBalancedOrder(["b", "a", "a", "a"], {"a": 0.5, "b": 0.5}, seed=1, rows=8)
    assert Counter(i > 0 for i in epoch_of(words, epoch)) == {True: 4, False: 4}
    assert set(epoch_of(ClassBalancedOrder(LABELS, {0: 1.0, 1: 0.0, 2: 0.0}, seed=1), epoch)) <= set(range(60))


def test_the_rows_of_a_class_are_drawn_equally_often():
    made, drawn = ORDERS["classes"](), Counter()
    for epoch in range(9):
        found = Counter(epoch_of(made, epoch))
        drawn += found
        for members in made.members:
            once = [found[i] for i in members.tolist()]
            ever = [drawn[i] for i in members.tolist()]
            assert max(once) - min(once) <= 2
            assert max(ever) - min(ever) <= 1
    assert all(drawn[i] for i in range(len(LABELS)))


def test_a_row_is_drawn_as_its_weight_says():
    expected = len(WEIGHTS) * WEIGHTS / WEIGHTS.sum()
    made, sums = ORDERS["weights"](), np.zeros(len(WEIGHTS))
    for epoch in range(400):
        counts = np.bincount(epoch_of(made, epoch), minlength=len(WEIGHTS))
        assert (counts >= np.floor(expected - 1e-9)).all()
        assert (counts <= np.ceil(expected + 1e-9)).all()
        assert (counts[WEIGHTS == 0] == 0).all()
        sums += counts
    assert np.abs(sums / 400 - expected).max() < 0.11  # 4.4 standard deviations of at most 0.5 / sqrt(400)


def test_equal_weights_are_a_permutation():
    assert sorted(epoch_of(WeightedOrder(np.full(101, 0.1), seed=1))) == list(range(101))
    assert len(set(epoch_of(WeightedOrder(np.ones(101), seed=1, rows=40)))) == 40


def test_weights_on_any_scale():
    for scale in (1e-300, 1e-12, 1e12, 1e300):
        found = epoch_of(WeightedOrder(WEIGHTS * scale, seed=7, rows=1000))
        assert not set(found) & set(np.flatnonzero(WEIGHTS == 0).tolist())


@pytest.mark.parametrize("epoch", range(3))
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_a_batch_never_exceeds_its_budget(epoch, parts):
    made = ORDERS["tokens"]()
    made.deal(accumulation=parts)
    batches = epoch_of(made, epoch)
    assert len(batches) % parts == 0
    assert sorted(chain(*batches)) == list(range(len(LENGTHS)))
    padded = [len(batch) * (-(-max(LENGTHS[i] for i in batch) // 8) * 8) for batch in batches]
    assert max(padded) <= 800
    assert sum(LENGTHS) / sum(padded) > 0.93
    assert max(LENGTHS) in [LENGTHS[i] for i in batches[0]]
    assert len({len(batch) for batch in batches}) > 5


def test_rows_of_like_length_meet_others_in_another_epoch():
    made = ORDERS["tokens"]()
    first, second = ({frozenset(batch) for batch in epoch_of(made, epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClassBalancedOrder([], seed=1), "0 draws from 0 rows"),
        (lambda: ClassBalancedOrder([0, 1], seed=1, rows=0), "0 draws from 2 rows"),
        (lambda: ClassBalancedOrder([0, 1], seed=-1), "seed=-1"),
        (lambda: ClassBalancedOrder([[0, 1]], seed=1), r"labels of shape \(1, 2\)"),
        (lambda: ClassBalancedOrder([0, 1], {0: 1.0}, seed=1), "shares name the classes 0, and the labels are 0, 1"),
        (lambda: ClassBalancedOrder([0, 1], {0: 0.5, 1: 0.6}, seed=1), "sum to 1; they sum to 1.1"),
        (lambda: ClassBalancedOrder([0, 1], {0: 1.5, 1: -0.5}, seed=1), "must be 0 or more"),
        (lambda: ClassBalancedOrder([0, 1], {0: float("nan"), 1: 0.5}, seed=1), "they sum to nan"),
        (lambda: WeightedOrder([], seed=1), "0 draws from 0 rows"),
        (lambda: WeightedOrder([1.0, float("nan")], seed=1), "row 1 has nan"),
        (lambda: WeightedOrder([-1.0, 1.0], seed=1), "row 0 has -1.0"),
        (lambda: WeightedOrder([0.0, 0.0], seed=1), "all are 0"),
        (lambda: WeightedOrder([[1.0]], seed=1), r"weights of shape \(1, 1\)"),
        (lambda: TokenBudgetBatches([], 100, seed=1), "0 rows, round_to=8, seed=1"),
        (lambda: TokenBudgetBatches([5, 99], 100, seed=1), "no row as long as row 1: 99 tokens, padded to 104"),
        (lambda: TokenBudgetBatches([5, 9], 100, seed=1).deal(ranks=3), "2 rows .* 3 ranks x 1 micro-batches"),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def collate(batch):
    columns = {name: [torch.as_tensor(row[name]) for row in batch] for name in batch[0]}
    return {
        name: pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        for name, values in columns.items()
    }


def various(count=30):
    data = rows(count).to_dict()
    for name in ("input_ids", "attention_mask"):
        data[name] = [row[: 2 + i % 7] for i, row in enumerate(data[name])]
    return Dataset.from_dict(data)


class Seen:
    """A collator that keeps what it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append([row["input_ids"] for row in batch])
        return collate(batch)


def samplers_of(data):
    return {
        "classes": ClassBalancedOrder(data["labels"], seed=3, rows=21),
        "weights": WeightedOrder([1 + i % 3 for i in range(len(data))], seed=3),
        "tokens": TokenBudgetBatches([len(ids) for ids in data["input_ids"]], 24, seed=3, round_to=1),
    }


@pytest.mark.parametrize("name", ["classes", "weights", "tokens"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_takes_the_order_and_a_resume_goes_on_in_it(trainer, tmp_path, name, accumulation):
    data = various()

    def run(**options):
        seen = Seen()
        made = trainer(
            train=data, train_sampler=samplers_of(data)[name], data_collator=seen, max_steps=-1, num_train_epochs=3,
            gradient_accumulation_steps=accumulation, per_device_train_batch_size=4, save_strategy="steps",
            save_steps=5, output_dir=str(tmp_path), **options,
        )  # fmt: skip
        return made, seen

    made, seen = run()
    made.train()
    expected, sampler = [], samplers_of(data)[name]
    if name == "tokens":
        sampler.deal(accumulation=accumulation)
    for epoch in range(3):
        found = epoch_of(sampler, epoch)
        cut = found if name == "tokens" else [found[i : i + 4] for i in range(0, len(found), 4)]
        expected += [[data["input_ids"][i] for i in batch] for batch in cut]
    assert seen.batches == expected
    resumed, rest = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rest.batches == expected[len(expected) - len(rest.batches) :]
    assert 0 < len(rest.batches) < len(expected)
    assert resumed.state.global_step == made.state.global_step
    for a, b in zip(made.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_of_a_step_of_uneven_batches_is_that_of_one_batch(trainer):
    """Four batches of a budget, and the same rows as one: the denominator is the step's."""
    data = various()
    made = samplers_of(data)["tokens"]
    run = trainer(
        train=data, train_sampler=made, data_collator=collate, gradient_accumulation_steps=4, max_steps=1,
        class_weights=[0.7, 3.1],
    )  # fmt: skip
    made.deal(accumulation=4)
    step = list(chain(*epoch_of(made)[:4]))
    model = trainer().model.eval()
    batch = collate([data[i] for i in step])
    run.model.eval()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], weight=torch.tensor([0.7, 3.1]))
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_mixin_brings_it_to_other_trainers(trainer):
    class Mine(ExactLossMixin, Seq2SeqTrainer):
        pass

    order = WeightedOrder(np.ones(22), seed=1)
    run = trainer(Mine, arguments_class=Seq2SeqTrainingArguments, train_sampler=order)
    assert run.get_train_dataloader().batch_sampler.sampler is order
    assert trainer(arguments_class=TrainingArguments, train_sampler=order)._get_train_sampler() is order


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "both give the order"),
        ({"train": various().to_iterable_dataset()}, "the training dataset is a stream"),
        ({"train": rows(21)}, "TokenBudgetBatches of 22 rows, and the training dataset has 21"),
        ({"accelerator_config": {"split_batches": True}}, "leave split_batches and dispatch_batches out"),
    ],
)
def test_a_sampler_that_cannot_be_used_is_refused(trainer, options, said):
    with pytest.raises(ValueError, match=said):
        trainer(train_sampler=TokenBudgetBatches([8] * 22, 64, seed=1), **options)
