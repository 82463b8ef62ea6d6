"""A head's own mean, turned back into sums: the heads of real models as the oracle."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import tiny_model
from trainer_ext.losses.model_head import head_denominator, head_terms
from trainer_ext.losses.of_batches import HeadLoss


def split_and_whole(model, inputs, labels, *, shifted):
    def terms(part):
        mean = model(**{name: value[part] for name, value in inputs.items()}, labels=labels[part]).loss
        return head_terms(mean, head_denominator(labels[part], shifted=shifted))

    whole = model(**inputs, labels=labels).loss
    parts = [terms(slice(0, 1)), terms(slice(1, 4)), terms(slice(4, 6))]
    return sum(p.numerator for p in parts) / sum(p.denominator for p in parts), whole


def test_causal_language_model():
    config = GPT2Config(vocab_size=30, n_positions=10, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 30, (6, 10))
    labels = ids.clone()
    labels[0, 3:], labels[2, :5] = -100, -100
    ours, whole = split_and_whole(model, {"input_ids": ids}, labels, shifted=True)
    assert abs(ours - whole) < 1e-6  # this head computes its loss in float32
    unshifted, _ = split_and_whole(model, {"input_ids": ids}, labels, shifted=False)
    assert abs(unshifted - whole) > 1e-4


@pytest.mark.parametrize(("num_labels", "tokens"), [(1, False), (3, False), (3, True)])
def test_classification_and_regression(num_labels, tokens):
    model = tiny_model(num_labels=num_labels, tokens=tokens, dtype=torch.float64).eval()
    ids = torch.randint(5, 40, (6, 8))
    labels = torch.rand(6).double() if num_labels == 1 else torch.randint(0, 3, (6, 8) if tokens else (6,))
    ours, whole = split_and_whole(model, {"input_ids": ids}, labels, shifted=False)
    assert abs(ours - whole) < 1e-14


def test_a_head_that_saw_no_label_counts_as_nothing():
    model = tiny_model(num_labels=3, tokens=True)
    labels = torch.full((2, 8), -100)
    mean = model(input_ids=torch.randint(5, 40, (2, 8)), labels=labels).loss
    assert torch.isnan(mean)
    terms = head_terms(mean, head_denominator(labels, shifted=False))
    terms.numerator.backward()
    assert (terms.numerator.item(), terms.denominator.item()) == (0.0, 0.0)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_first_label_of_a_row_is_no_target_of_a_causal_model():
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    assert (head_denominator(labels, shifted=False), head_denominator(labels, shifted=True)) == (5, 3)


def test_the_means_of_dataparallels_replicas_are_one_mean():
    """Each replica gets a chunk of the rows, and the losses come back as a vector: three labels, and one."""
    model = tiny_model(num_labels=3, tokens=True, dtype=torch.float64).eval()
    batch = {"input_ids": torch.randint(5, 40, (4, 8)), "labels": torch.full((4, 8), -100)}
    batch["labels"][:2, :3], batch["labels"][3, 0] = 1, 2

    def replicas(**inputs):
        chunks = zip(*(value.chunk(2) for value in inputs.values()), strict=True)
        losses = [model(**dict(zip(inputs, chunk, strict=True))).loss for chunk in chunks]
        return {"loss": torch.stack(losses)}

    loss = HeadLoss(["labels"])
    terms, _ = loss.terms(replicas, batch)
    assert terms.denominator == 7
    assert abs(terms.mean() - model(**batch).loss) < 1e-14
    assert abs(replicas(**batch)["loss"].mean() - model(**batch).loss) > 1e-4
