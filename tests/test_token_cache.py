"""Token ids are made once for the same rows, tokenizer and length, by one of several ranks, and are never stale."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer_ext.data import load_splits, tokenize
from trainer_ext.token_cache import FOLDER

WORDS = ["[PAD]", "[UNK]", "one", "two", "three"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    return tmp_path / "train.jsonl"


def put(file, *texts):
    """Rows in `file`, which says that it has not changed."""
    file.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)))
    os.utime(file, (10**9, 10**9))


class Counting(PreTrainedTokenizerFast):
    """One of transformers, in name, that counts its calls."""

    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


Counting.__module__ = "transformers.counting"


def tokenizer(words=WORDS):
    Counting.calls = 0
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return Counting(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def ids(file, *, words=WORDS, **options):
    """The token ids of `file`, and how often the tokenizer was called for them."""
    encoded = tokenize(load_splits(str(file)), tokenizer(words), **options)["train"]
    return encoded["input_ids"][:], encoded["labels"][:], Counting.calls


def test_the_same_is_read_and_equal_to_what_was_made(corpus):
    put(corpus, "one two", "three")
    assert ids(corpus) == ([[2, 3], [4]], [0, 1], 1)
    assert ids(corpus) == ([[2, 3], [4]], [0, 1], 0)
    assert ids(corpus, cache=False)[:2] == ([[2, 3], [4]], [0, 1])


def test_the_same_rows_under_another_name_are_read(corpus):
    put(corpus, "one two", "three")
    ids(corpus)
    other = corpus.with_name("copy.jsonl")
    put(other, "one two", "three")
    assert ids(other)[2] == 0


def test_a_tokenizer_that_was_used_before_is_the_same(corpus):
    put(corpus, "one two", "three")
    ids(corpus)
    used = tokenizer()
    used(["one", "one two"], padding=True, truncation=True, max_length=7)
    Counting.calls = 0
    tokenize(load_splits(str(corpus)), used)
    assert Counting.calls == 0


def test_a_file_that_changed_within_its_time_stamp(corpus):
    put(corpus, "one two", "three")
    ids(corpus)
    put(corpus, "two one", "three")
    assert ids(corpus) == ([[3, 2], [4]], [0, 1], 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"words": ["[PAD]", "[UNK]", "three", "two", "one"]}, [[4, 3], [2]]),
        ({"max_length": 1}, [[2], [4]]),
    ],
)
def test_another_tokenizer_or_length_is_made(corpus, change, expected):
    put(corpus, "one two", "three")
    ids(corpus)
    assert ids(corpus, **change) == (expected, [0, 1], 1)


def test_other_labels_are_not_mixed_up(corpus):
    put(corpus, "one two", "three")
    ids(corpus)
    corpus.write_text('{"text": "one two", "label": 1}\n{"text": "three", "label": 0}\n')
    assert ids(corpus)[1] == [1, 0]


RANK = """
import sys
from transformers import PreTrainedTokenizerFast
from trainer_ext.data import load_splits, tokenize
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
made = tokenize(load_splits(sys.argv[1]), tokenizer)["train"]
print(len(made), sum(map(sum, made["input_ids"])))
"""


def test_ranks_that_come_together(corpus, tmp_path):
    put(corpus, *["one two", "three"] * 50)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = [sys.executable, "-c", RANK, str(corpus), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(words, env=environment, **pipes) for _ in range(2)]
    said, bars = zip(*(rank.communicate(timeout=120) for rank in ranks), strict=True)
    assert [words.split() for words in said] == [["100", str(50 * (2 + 3 + 4))]] * 2
    assert sorted("Tokenising" in bar for bar in bars) == [False, True]
    assert len(list((tmp_path / "cache" / FOLDER).glob("*.arrow"))) == 1
