"""The example of a model and a loss of one's own: what the model is told of a pair, its symmetry, and its loss."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import BertConfig

from tests.readme import ROOT
from trainer_ext.models import load_tokenizer, tiny_checkpoint

PAIRS = [
    ("he sold the red car", "the red car was sold by him"),
    ("it rained", "the match was put off until the next week because it rained"),
    ("a a b", "b a"),
]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    import pair_model
    import paraphrases

    sys.path.remove(str(ROOT / "examples"))
    return pair_model, paraphrases


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture
def model(example):
    """With what is learnt at values that show."""
    torch.manual_seed(0)
    made = example[0].PairClassifier.from_pretrained(str(tiny_checkpoint()), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.shared.parameters():
            parameter.normal_()
    return made


def encoded(tokenizer, pairs):
    first, second = zip(*pairs, strict=True)
    return dict(tokenizer(list(first), list(second), padding=True, return_tensors="pt"))


def told(model, batch):
    """The kinds and similarities that the model computes, of the pairs and then of the swapped pairs."""
    heard = []
    hook = model.shared.register_forward_pre_hook(lambda module, args: heard.append(args))
    model(**batch)
    hook.remove()
    return heard[0]


def expected_kinds(row, types, mask):
    """By words in plain Python: 0 no word, 1 not shared, 2 shared, 3 shared together with a neighbour."""
    length = int(mask.sum())
    cut = int((types[:length] == 0).sum())
    sides = {0: list(range(1, cut - 1)), 1: list(range(cut, length - 1))}
    kinds = [0] * len(row)
    for side, places in sides.items():
        others = sides[1 - side]
        for i in places:
            shared = [j for j in others if row[i] == row[j]]
            beside = any(
                i + d in places and j + d in others and row[i + d] == row[j + d] for j in shared for d in (-1, 1)
            )
            kinds[i] = 1 + bool(shared) + beside
    return kinds


def test_what_it_starts_from_changes_no_word(example):
    made = example[0].PairClassifier.from_pretrained(str(tiny_checkpoint()), attn_implementation="eager")
    assert not made.shared.kinds.any()
    assert not made.shared.nearest.any()
    assert (made.shared.pull == 1).all()


def test_the_other_order_is_the_tokenizers(model, tokenizer):
    batch = encoded(tokenizer, PAIRS)
    swapped = encoded(tokenizer, [(b, a) for a, b in PAIRS])
    words = []
    hook = model.bert.embeddings.word_embeddings.register_forward_pre_hook(lambda module, args: words.append(args[0]))
    model(**batch)
    hook.remove()
    assert torch.equal(words[0], torch.cat([batch["input_ids"], swapped["input_ids"]]))


def test_both_orders_have_one_answer(model, tokenizer):
    given, swapped = (model(**encoded(tokenizer, pairs)).logits for pairs in (PAIRS, [(b, a) for a, b in PAIRS]))
    assert given.shape == (3, 2)
    torch.testing.assert_close(given, swapped, rtol=1e-5, atol=1e-6)
    model.train()
    orders = model(**encoded(tokenizer, PAIRS)).logits
    assert orders.shape == (3, 2, 2)
    assert not torch.allclose(orders[:, 0], orders[:, 1])


def test_heads_learn_how_far_to_lean(example, tokenizer):
    """From the second layer on: what the first word sees of the others in the first layer leans to nothing."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    made = example[0].PairClassifier(config)
    made(**encoded(tokenizer, PAIRS), labels=torch.tensor([1, 0, 1])).loss.backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in (made.shared.pull, made.shared.nearest))


def test_padding_does_not_matter(model, tokenizer):
    alone = torch.cat([model(**encoded(tokenizer, [pair])).logits for pair in PAIRS])
    torch.testing.assert_close(model(**encoded(tokenizer, PAIRS)).logits, alone, rtol=1e-4, atol=1e-5)


def test_kinds_and_similarities_are_those_of_the_words(model, tokenizer):
    batch = encoded(tokenizer, PAIRS)
    kinds, similar = told(model, batch)
    table = model.bert.embeddings.word_embeddings.weight.detach()
    for n in range(len(PAIRS)):
        row, types, mask = (batch[name][n] for name in ("input_ids", "token_type_ids", "attention_mask"))
        assert kinds[n].tolist() == expected_kinds(row.tolist(), types, mask)
        words = [i for i, kind in enumerate(kinds[n].tolist()) if kind]
        for i in words:
            for j in words:
                a, b = (table[row[k]] - table.mean(0) for k in (i, j))
                cosine = 1.0 if row[i] == row[j] else max(0.0, float(a @ b / (a.norm() * b.norm())))
                assert abs(float(similar[n, i, j]) - cosine * bool(types[i] != types[j])) <= 1e-5
    assert {0, 1, 2, 3} == set(kinds.flatten().tolist())


def test_r_drop_is_that_of_the_paper(example):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    loss = example[1].RDrop()
    found = loss(logits, labels, alpha=0.7)
    p, q = (Categorical(logits=logits[:, k]) for k in (0, 1))
    cross_entropy = -(p.log_prob(labels) + q.log_prob(labels)) / 2
    expected = cross_entropy + 0.7 * (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    torch.testing.assert_close(found.numerator, expected.sum(), rtol=1e-12, atol=0.0)
    assert found.denominator == loss.denominator(labels) == 4
    assert loss(logits, labels, alpha=0.0).numerator < found.numerator


def test_one_reading_has_cross_entropy(example):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = example[1].RDrop()(logits, labels)
    torch.testing.assert_close(found.mean(), torch.nn.functional.cross_entropy(logits, labels))


def test_the_script_trains_and_what_it_saves_is_loaded(example, tmp_path, tokenizer):
    words = ["--output_dir", str(tmp_path), "--dataset", "sample", "--model", "tiny", "--max_steps", "3", "--use_cpu"]
    done = subprocess.run(
        [sys.executable, "examples/paraphrases.py", *words, "--report_to", "none"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"eval_accuracy", "eval_f1"} <= json.loads((tmp_path / "eval_results.json").read_text()).keys()
    made = example[0].PairClassifier.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
    assert made.shared.kinds.abs().sum() > 0
    assert torch.isfinite(made(**encoded(tokenizer, PAIRS)).logits).all()
