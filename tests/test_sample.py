"""The built-in sample: reproducible to the byte, balanced as promised, and free of shortcuts and leaks."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from random import Random

import pytest

from trainer_ext import sample

DIGESTS = {
    "train": "04a251a8fcfad9ed4765bf5da2bc1b67195be5e9f511ff65cb441915dc80b0cb",
    "validation": "f3114ebc5419af09a3a2756fb1fb3f527c63f1e9b3a1e38ea67e614dd2964f83",
}
PROGRAM = """
import hashlib, json, sys
from trainer_ext.sample import sample_rows
print([hashlib.sha256(json.dumps(sample_rows(s)).encode()).hexdigest() for s in ("train", "validation")])
print(sorted({"numpy", "torch", "datasets", "transformers"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def pairs():
    return sample.generate_pairs()


@pytest.fixture(scope="module")
def rows():
    return {split: sample.sample_rows(split) for split in sample.SIZES}


def sentences(rows):
    return {row[field] for row in rows for field in ("sentence1", "sentence2")}


def events(pairs):
    return {(pair.kind, *facts.items()) for pair in pairs for facts in pair.facts}


@pytest.mark.parametrize("split", DIGESTS)
def test_rows_are_frozen(rows, split):
    assert hashlib.sha256(json.dumps(rows[split]).encode()).hexdigest() == DIGESTS[split]


def test_rows_do_not_depend_on_the_hash_seed_nor_on_heavy_imports():
    env = os.environ | {"PYTHONHASHSEED": "4242"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(list(DIGESTS.values())), "[]"]


@pytest.mark.parametrize(("split", "positives", "negatives"), [("train", 4080, 1920), ("validation", 272, 128)])
def test_sizes_and_balance_are_exact(rows, split, positives, negatives):
    assert Counter(row["label"] for row in rows[split]) == {1: positives, 0: negatives}


@pytest.mark.parametrize("split", sample.SIZES)
def test_fields_types_and_texts(rows, split):
    for position, row in enumerate(rows[split]):
        assert {name: type(value) for name, value in row.items()} == {
            "sentence1": str,
            "sentence2": str,
            "label": int,
            "idx": int,
        }
        assert row["idx"] == position
        assert row["sentence1"] != row["sentence2"]
        for text in (row["sentence1"], row["sentence2"]):
            assert 8 <= len(text.split()) <= 20
            assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ,]+ \.", text), text


@pytest.mark.parametrize("split", sample.SIZES)
def test_no_pair_occurs_twice(rows, split):
    assert len({(row["sentence1"], row["sentence2"]) for row in rows[split]}) == sample.SIZES[split]


def test_the_splits_share_neither_sentences_nor_events(rows, pairs):
    assert not sentences(rows["train"]) & sentences(rows["validation"])
    assert not events(pairs["train"]) & events(pairs["validation"])


def test_the_label_says_whether_the_facts_agree(pairs):
    for pair in (*pairs["train"], *pairs["validation"]):
        first, second = pair.facts
        assert (first == second) == bool(pair.row["label"])
        assert list(first) == list(second)


@pytest.mark.parametrize("kind", sample.KINDS)
def test_every_wording_states_every_fact(kind):
    slots = {slot.partition(":")[0] for slot in sample.KINDS[kind].slots}
    for wording in sample.KINDS[kind].wordings:
        assert set(re.findall(r"\{(\w+)", wording)) == slots, wording


def test_every_validation_word_occurs_in_training(rows):
    words = {split: set(" ".join(sentences(rows[split])).lower().split()) for split in rows}
    assert not words["validation"] - words["train"]
    assert 60 <= len(words["train"]) <= 1500


def test_callers_get_rows_of_their_own(rows):
    sample.sample_rows("validation")[0]["label"] = None
    assert sample.sample_rows("validation")[0] == rows["validation"][0]


def test_an_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="'test': choose one of train, validation"):
        sample.sample_rows("test")


def bag_of_words_accuracy(rows, fields):
    """Validation accuracy of naive Bayes over the words of ``fields``, trained on the training split."""

    def words(row):
        return " ".join(row[field] for field in fields).lower().split()

    counts = {0: Counter(), 1: Counter()}
    for row in rows["train"]:
        counts[row["label"]].update(words(row))
    vocabulary = counts[0].keys() | counts[1].keys()
    totals = {label: counts[label].total() + len(vocabulary) for label in counts}

    def score(row, label):
        fits = sum(math.log((counts[label][word] + 1) / totals[label]) for word in words(row))
        return fits + math.log(0.68 if label else 0.32)

    hits = [(score(row, 1) >= score(row, 0)) == bool(row["label"]) for row in rows["validation"]]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("fields", [("sentence1",), ("sentence2",), ("sentence1", "sentence2")])
def test_a_bag_of_words_does_not_give_the_label(rows, fields):
    assert bag_of_words_accuracy(rows, fields) <= 0.71, "the majority class is 0.68"


def test_the_bag_of_words_check_would_see_a_cue(rows):
    def cued(row):
        return row | {"sentence2": row["sentence2"] + (" indeed" if row["label"] else " however")}

    marked = {split: [cued(row) for row in rows[split]] for split in rows}
    assert bag_of_words_accuracy(marked, ("sentence2",)) > 0.95


def test_word_overlap_does_not_give_the_label(rows):
    """No threshold on the share of common words solves the task."""

    def overlap(row):
        first, second = (set(row[field].lower().split()) for field in ("sentence1", "sentence2"))
        return len(first & second) / len(first | second)

    scored = [(overlap(row), row["label"]) for row in rows["train"]]
    best = max(
        sum((score >= threshold) == bool(label) for score, label in scored) / len(scored)
        for threshold in [step / 100 for step in range(101)]
    )
    assert 0.68 < best < 0.88


def test_pools_too_small_for_the_sizes_end_in_an_error(monkeypatch):
    held_out = frozenset(sample._key(kind, event) for kind, event in all_events())
    monkeypatch.setattr(sample, "MOST_DRAWS", 20)
    with pytest.raises(AssertionError, match=r"no new pair of kind '.*' in 20 draws"):
        sample._split(Random(0), 10, held_out)


def all_events():
    """Every event of every kind."""
    for name, kind in sample.KINDS.items():
        slots = [sample._name(slot) for slot in kind.slots]
        for values in product(*(sample._pool(slot) for slot in kind.slots)):
            yield name, dict(zip(slots, values, strict=True))
