"""Labels: read as one column, numbered, and held to 0..C-1 with the row in the message."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from trainer_ext.labels import (
    check_class_labels,
    column_labels,
    first_missing,
    label_column,
    number_labels,
    read_labels,
)


def splits(train, validation=None, features=None):
    columns = {"train": train} | ({} if validation is None else {"validation": validation})
    return DatasetDict({name: Dataset.from_dict({"label": values}, features) for name, values in columns.items()})


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_reads_a_column_as_int64():
    assert read_labels(Dataset.from_dict({"label": [2, 0, 1]})).tolist() == [2, 0, 1]
    for kind in ("int8", "uint8", "uint64", "bool"):
        narrow = Dataset.from_dict({"label": [1, 0]}, Features({"label": Value(kind)}))
        assert read_labels(narrow).dtype == torch.int64
        assert read_labels(narrow).tolist() == [1, 0]


def test_reads_a_changed_order_and_nested_labels():
    shuffled = Dataset.from_dict({"labels": [0, 1, 2, 3]}).select([3, 1])
    assert read_labels(shuffled).tolist() == [3, 1]
    tokens = Dataset.from_dict({"labels": [[0, -100], [2]]}, Features({"labels": List(Value("int64"))}))
    assert read_labels(tokens).tolist() == [0, -100, 2]


def test_reads_items_of_any_dataset_with_a_length():
    assert read_labels(Items([{"labels": [1]}, {"labels": torch.tensor([0, 2])}])).tolist() == [1, 0, 2]
    assert read_labels(Items([{"label": 1}, {"label": 0}])).tolist() == [1, 0]
    assert read_labels(Items([{"text": "a"}])) is None
    assert read_labels(iter([])) is None
    assert read_labels(Dataset.from_dict({"text": ["a"]})) is None


def test_the_label_column_is_the_one_that_collators_take():
    assert label_column(Dataset.from_dict({"label": [0], "labels": [1]})) == "labels"
    assert label_column(Dataset.from_dict({"target": [0]})) is None
    assert label_column([{"label": 0}]) is None


def test_a_missing_label_is_named_by_its_row():
    dataset = Dataset.from_dict({"label": [0, 1, None, None]})
    assert first_missing(dataset, "label") == 2
    assert first_missing(Dataset.from_dict({"label": [0, 1]}), "label") is None
    with pytest.raises(ValueError, match="row 2 of the dataset has no value in its label column 'label'"):
        read_labels(dataset)
    with pytest.raises(ValueError, match="missing value in its label column 'labels'"):
        read_labels(Dataset.from_dict({"labels": [[0, 1], [None, 1]]}))


@pytest.mark.parametrize("values", [["a", "b"], [{"x": 1}, {"x": 2}]])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ValueError, match="'label' holds .* labels are whole numbers or texts"):
        column_labels(Dataset.from_dict({"label": values}), "label")


def test_check_class_labels():
    check_class_labels(torch.tensor([0, 2, -100]), 3, "train")
    check_class_labels(torch.tensor([[0, -1], [1, 0]]), 2, "train", ignore_index=-1)
    with pytest.raises(ValueError, match=r"^eval: label 7 at row 1 is outside 0\.\.1"):
        check_class_labels(torch.tensor([0, 7]), 2, "eval")
    with pytest.raises(ValueError, match="label -1 at row 0"):
        check_class_labels(torch.tensor([-1, 1]), 2, "train")
    with pytest.raises(ValueError, match=r"torch\.float32.*loss='model'"):
        check_class_labels(torch.tensor([0.0, 1.0]), 2, "train")


def test_integers_stay_and_get_their_own_names():
    numbered, names = number_labels(splits([1, 0, 2], [2, 1]), "label")
    assert names == ["0", "1", "2"]
    assert {name: split["label"][:] for name, split in numbered.items()} == {"train": [1, 0, 2], "validation": [2, 1]}


def test_text_is_numbered_in_sorted_order_in_every_split():
    numbered, names = number_labels(splits(["spam", "ham", "eggs"], ["ham"]), "label")
    assert names == ["eggs", "ham", "spam"]
    assert numbered["train"]["label"][:] == [2, 1, 0]
    assert numbered["validation"]["label"][:] == [1]


def test_booleans_are_0_and_1():
    numbered, names = number_labels(splits([True, False, True], [False]), "label")
    assert names == ["False", "True"]
    assert numbered["train"]["label"][:] == [1, 0, 1]
    assert numbered["train"].features["label"] == Value("int64")


def test_names_of_a_class_label_are_kept():
    features = Features({"label": ClassLabel(names=["no", "yes", "perhaps"])})
    numbered, names = number_labels(splits([1, 0], [2], features), "label")
    assert names == ["no", "yes", "perhaps"]
    assert numbered["validation"]["label"][:] == [2]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            [0, 1, 7, 1],
            None,
            r"train split has the label 7 at row 2, outside 0\.\.2: train has the labels \[0, 1, 7\]",
        ),
        ([0, 1, -1], None, "train split has the label -1 at row 2"),
        ([1, 2], None, "train split has the label 2 at row 1.*renumber"),
        ([0, 1], [1, 2], r"validation split has the label 2 at row 1, outside 0\.\.1"),
        ([0, 1], [0, -100], "validation split has the label -100 at row 1"),
        ([0, None], None, "train split has no label in 'label' at row 1"),
        (["a", "b"], ["a", None], "validation split has no label in 'label' at row 1"),
        (["a", "b"], [None, None], "validation split has no label in 'label' at row 0"),
        (["a", " "], None, "train split has no label at row 1, but ' '"),
        (["0", "1", "NA"], None, "train split has no label at row 2, but 'NA'"),
        (["a", "b"], ["b", "z"], "validation split has the label 'z' at row 1, which train does not have"),
        (["0", "1"], [0, 1], r"validation split has labels of another kind .*int64.*string"),
        ([0, 1], ["0", "1"], r"validation split has labels of another kind .*string.*int64"),
        ([0.0, 1.0], None, "train split are .*float64.*a class is an integer or text"),
        ([0, 1], [0.0, 0.5], "validation split are .*float64"),
        ([[0, 1], [1, 0]], None, "train split are List.*a class is an integer or text"),
        ([0, 0], None, "every label of its train split is '0'"),
        (["a", "a"], None, "every label of its train split is 'a'"),
        ([True, True], None, "every label of its train split is 'True'"),
    ],
)
def test_labels_that_cannot_be_trained_on(train, validation, message):
    with pytest.raises(ValueError, match=message):
        number_labels(splits(train, validation), "label")


def test_na_is_a_class_among_words():
    assert number_labels(splits(["EU", "NA"]), "label")[1] == ["EU", "NA"]


def test_a_split_without_the_column_is_named():
    pair = DatasetDict({"train": Dataset.from_dict({"y": [0, 1]}), "validation": Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(ValueError, match=r"validation split has no label column 'y'; it has \['text'\]"):
        number_labels(pair, "y")
