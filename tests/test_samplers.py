"""Orders that are the same on every rank: a permutation an epoch, grouped, dealt out well, and told the epoch."""

from statistics import mean

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import Array2D, Dataset, Features
from torch.utils.data import BatchSampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.conftest import rows
from trainer_ext import ExactLossMixin
from trainer_ext.samplers import LengthGroupedOrder, measure_rows, read_numbers, tell_epoch

LENGTHS = torch.randint(1, 200, (1003,), generator=torch.Generator().manual_seed(3)).tolist()


def order(epoch=0, *, lengths=LENGTHS, step_size=16, seed=7):
    sampler = LengthGroupedOrder(lengths, step_size, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def cut(sequence, size):
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


def padding(indices, size):
    """How many tokens of micro-batches of `size` rows are padding."""
    batches = [[LENGTHS[i] for i in batch] for batch in cut(indices, size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_every_epoch_is_another_permutation():
    epochs = [order(epoch) for epoch in range(3)]
    for found in epochs:
        assert sorted(found) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_it_depends_on_the_seed_and_the_epoch_alone():
    torch.manual_seed(1)
    first = order(2)
    torch.manual_seed(2)
    assert order(2) == first
    assert order(2, seed=8) != first
    sampler = LengthGroupedOrder(LENGTHS, 16, seed=7)
    state = torch.get_rng_state()
    assert list(sampler) == list(sampler) == order(0)
    assert torch.equal(torch.get_rng_state(), state)  # dropout goes on as if nothing had been drawn


@pytest.mark.parametrize("micro_batch", [2, 4, 16])
def test_grouping_saves_most_of_the_padding(micro_batch):
    at_random = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(7)).tolist()
    assert padding(order(), micro_batch) < 0.2 * padding(at_random, micro_batch)


def test_a_steps_rows_come_longest_first_and_the_longest_of_all_at_once():
    found = [[LENGTHS[i] for i in step] for step in cut(order(), 16)]
    assert all(step == sorted(step, reverse=True) for step in found)
    assert found[0][0] == max(LENGTHS)


def test_steps_come_in_random_order():
    """Long and short steps mix: sorted from long to short, as megabatches are, neighbours would be alike."""
    heights = [mean(LENGTHS[i] for i in step) for step in cut(order(), 16)][1:-1]
    assert abs(np.corrcoef(heights[1:], heights[:-1])[0, 1]) < 0.3


def test_the_rows_that_fill_no_step_are_drawn_at_random():
    """`dataloader_drop_last` drops them: over epochs they are as long as any."""
    left = [LENGTHS[i] for epoch in range(100) for i in order(epoch)[-11:]]
    assert len(LENGTHS) % 16 == 11
    assert mean(left) == pytest.approx(mean(LENGTHS), rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 33])
@pytest.mark.parametrize("step_size", [1, 2, 16, 40])
def test_any_number_of_rows_and_any_step(count, step_size):
    found = order(lengths=LENGTHS[:count], step_size=step_size)
    assert sorted(found) == list(range(count))
    if count >= step_size:
        assert LENGTHS[found[0]] == max(LENGTHS[:count])


@pytest.mark.parametrize(("lengths", "step_size"), [([], 4), ([1, 2], 0)])
def test_nothing_to_put_in_order(lengths, step_size):
    with pytest.raises(ValueError, match="rows in steps of .* nothing to put in order"):
        LengthGroupedOrder(lengths, step_size, seed=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_draw_the_one_order(ranks, accumulation):
    """accelerate's own shards, put together in rank order, without the rows with which it fills the last round."""
    size = 16 // ranks // accumulation
    shards = []
    for rank in range(ranks):
        sampler = LengthGroupedOrder(LENGTHS, size * accumulation * ranks, seed=7)
        batches = BatchSampler(sampler, size, drop_last=False)
        shards.append(list(BatchSamplerShard(batches, ranks, rank)))
    dealt = [i for batches in zip(*shards, strict=True) for batch in batches for i in batch]
    assert dealt[: len(LENGTHS)] == order()


def test_the_ranks_of_a_step_pad_about_as_much():
    """Four ranks, each with the micro-batch of four rows that accelerate deals it."""

    def spread(indices):
        longest = [[max(LENGTHS[i] for i in batch) for batch in cut(step, 4)] for step in cut(indices, 16)[:-1]]
        return mean(max(ranks) - min(ranks) for ranks in longest)

    at_random = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(7)).tolist()
    assert spread(order()) < 0.25 * spread(at_random)


def loader_of_one_rank():
    sampler = LengthGroupedOrder(LENGTHS, 16, seed=7)
    shard = BatchSamplerShard(BatchSampler(sampler, 8, drop_last=False), num_processes=2, process_index=0)
    return DataLoaderShard(Dataset.from_dict({"length": LENGTHS}), batch_sampler=shard), sampler


def test_the_epoch_arrives_below_a_resumed_loader():
    loader, sampler = loader_of_one_rank()
    resumed = skip_first_batches(loader, 3)
    resumed.set_epoch(2)
    assert sampler.epoch == 0  # so far accelerate alone reaches
    tell_epoch(loader, 2)
    assert sampler.epoch == 2
    first = next(iter(resumed))["length"].tolist()
    assert first == [LENGTHS[i] for i in order(2)[3 * 16 : 3 * 16 + 8]]


def test_tell_epoch_takes_any_loader():
    tell_epoch(torch.utils.data.DataLoader([1, 2]), 1)
    tell_epoch(iter([1]), 1)


def lists(**columns):
    return Dataset.from_dict({"input_ids": [[1] * length for length in LENGTHS[:50]], **columns})


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {"input_ids": torch.ones(LENGTHS[i])}


DATASETS = {
    "table": lists,
    "table of tensors": lambda: lists().with_format("torch"),
    "transformed": lambda: Dataset.from_dict({"n": LENGTHS[:50]}).with_transform(
        lambda batch: {"input_ids": [[1] * n for n in batch["n"]]}
    ),
    "transformed in place": lambda: Dataset.from_dict({"input_ids": [[1]] * 50}).with_transform(
        lambda batch: {"input_ids": [[1] * n for n in LENGTHS[:50]][: len(batch["input_ids"])]}
    ),
    "torch": Pairs,
    "list": lambda: [{"input_ids": "x" * length} for length in LENGTHS[:50]],
}


@pytest.mark.parametrize("kind", [kind for kind in DATASETS if kind != "transformed in place"])
def test_rows_are_measured(kind):
    assert measure_rows(DATASETS[kind](), "input_ids").tolist() == LENGTHS[:50]


def test_what_a_transform_makes_is_what_is_measured():
    assert measure_rows(DATASETS["transformed in place"](), "input_ids").tolist() == [LENGTHS[0]] * 50


def test_rows_that_were_selected_and_shuffled_are_measured():
    data = lists(label=LENGTHS[:50]).select(range(10, 40)).shuffle(seed=1)
    assert measure_rows(data, "input_ids").tolist() == data["label"][:]
    assert read_numbers(data, "label").tolist() == data["label"][:]


def test_rows_of_matrices_are_measured():
    features = Features({"pixels": Array2D(shape=(None, 2), dtype="float32")})
    data = Dataset.from_dict({"pixels": [np.zeros((n, 2)) for n in (3, 1, 2)]}, features=features)
    assert measure_rows(data, "pixels").tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Dataset.from_dict({"text": ["a"]}), "length of 'input_ids', and the first row has text"),
        ([(1, 2)], "length of 'input_ids', and the first row is a tuple"),
        (Dataset.from_dict({"input_ids": [[1], None]}), "column 'input_ids' is empty in 1 rows"),
    ],
)
def test_rows_without_a_length_are_an_error(dataset, said):
    with pytest.raises(ValueError, match=said):
        measure_rows(dataset, "input_ids")


@pytest.mark.parametrize(
    ("column", "said"), [(["a", "b"], "one number a row; it holds string"), ([1, None], "empty in 1 rows")]
)
def test_a_column_that_holds_no_lengths_is_an_error(column, said):
    with pytest.raises(ValueError, match=said):
        read_numbers(Dataset.from_dict({"size": column}), "size")


def various(count=22, **columns):
    """The rows of the other tests, cut to various lengths."""
    data = rows(count).to_dict() | columns
    for name in ("input_ids", "attention_mask"):
        data[name] = [row[: 2 + i % 7] for i, row in enumerate(data[name])]
    return Dataset.from_dict(data)


def sampler_of(run):
    return run.get_train_dataloader().batch_sampler.sampler


@pytest.fixture
def grouped(trainer):
    def make(*args, **options):
        return trainer(*args, **{"train": various(), "train_sampling_strategy": "group_by_length", **options})

    return make


def test_the_trainer_groups_by_the_length_of_input_ids(grouped):
    sampler = sampler_of(grouped())
    assert isinstance(sampler, LengthGroupedOrder)
    assert sampler.lengths.tolist() == [2 + i % 7 for i in range(22)]


class Tokenizer:
    model_input_names = ("token_type_ids", "input_ids")

    def save_pretrained(self, folder):
        pass


def test_the_tokenizer_says_which_column_is_measured(grouped):
    data = various(token_type_ids=[[0] * (1 + i) for i in range(22)])
    sampler = sampler_of(grouped(train=data, processing_class=Tokenizer()))
    assert sampler.lengths.tolist() == [1 + i for i in range(22)]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_column_of_lengths_wins(grouped, remove_unused_columns):
    """Also where the model does not take it, so that it is gone when the loader is built."""
    data = various(size=list(range(22)))
    run = grouped(train=data, length_column_name="size", remove_unused_columns=remove_unused_columns)
    assert sampler_of(run).lengths.tolist() == list(range(22))


@pytest.mark.parametrize(
    ("options", "step_size"),
    [
        ({"per_device_train_batch_size": 4}, 4),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 12),
        ({"per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}}, 4),
    ],
)
def test_a_step_is_what_the_arguments_say(grouped, options, step_size):
    assert sampler_of(grouped(**options)).step_size == step_size


def test_data_seed_wins_over_seed(grouped):
    assert sampler_of(grouped(seed=3)).seed == 3
    assert sampler_of(grouped(seed=3, data_seed=0)).seed == 0


def test_the_mixin_brings_it_to_other_trainers(grouped):
    class Mine(ExactLossMixin, Seq2SeqTrainer):
        pass

    run = grouped(Mine, arguments_class=Seq2SeqTrainingArguments)
    assert isinstance(sampler_of(run), LengthGroupedOrder)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_three_epochs_of_training_see_every_row_once(grouped, accumulation):
    seen = []

    def collate(batch):
        seen.extend(row["input_ids"] for row in batch)
        width = max(len(row["input_ids"]) for row in batch)
        filled = {name: [row[name] + [0] * (width - len(row[name])) for row in batch] for name in batch[0]
                  if name != "labels"}  # fmt: skip
        return {name: torch.tensor(values) for name, values in filled.items()} | {
            "labels": torch.tensor([row["labels"] for row in batch])
        }

    run = grouped(
        data_collator=collate,
        num_train_epochs=3,
        max_steps=-1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    run.train()
    data, sampler = various(), LengthGroupedOrder([2 + i % 7 for i in range(22)], 8, seed=42)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [data["input_ids"][i] for i in sampler]
    assert seen == expected
    assert len(expected) == 66


@pytest.mark.parametrize("size", [{}, {"size": []}])
def test_an_empty_dataset_is_an_error(grouped, size):
    data = Dataset.from_dict({"input_ids": [], "labels": [], **size})
    with pytest.raises(ValueError, match="0 rows in steps of 8"):
        grouped(train=data, length_column_name="size").train()


def test_other_strategies_are_left_to_the_trainer(trainer):
    for strategy, name in (("random", "SeedableRandomSampler"), ("sequential", "SequentialSampler")):
        run = trainer(train=various(), train_sampling_strategy=strategy)
        assert type(sampler_of(run)).__name__ == name


def test_a_stream_has_no_lengths_to_go_by(grouped):
    run = grouped(train=various().to_iterable_dataset())
    assert run._get_train_sampler() is None


REBALANCED = {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 4}


def test_rebalanced_batches_go_by_the_seed(trainer):
    for options, seed in (({"seed": 5}, 5), ({"seed": 5, "data_seed": 6}, 6)):
        run = trainer(train=various(), per_device_train_batch_size=2, **REBALANCED, **options)
        assert run.get_train_dataloader().batch_sampler.seed == seed


def test_rebalancing_that_repeats_rows_is_refused(trainer):
    """22 rows in steps of 20 leave 2 for 4 micro-batches."""
    options = {"train": various(), "per_device_train_batch_size": 5, **REBALANCED}
    with pytest.raises(ValueError, match=r"2 rows for 4 micro-batches \(ranks x accumulation: 1 x 4\)"):
        trainer(**options).train()
    run = trainer(**options, dataloader_drop_last=True)
    assert len({i for batch in run.get_train_dataloader().batch_sampler for i in batch}) == 20
