"""The loss contract on real trainers: however a step is split, it is one big batch through PyTorch's own loss."""

import copy

import pytest
import torch
from datasets import Value
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    default_data_collator,
)

from tests.conftest import SIZES, logged, rows, tiny_model
from trainer_ext import CustomTrainer, LossTerms
from trainer_ext.losses import cross_entropy

WEIGHTS = [0.4, 2.0]
SPLITS = [(16, 1), (8, 2), (4, 4), (2, 8)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def first_step(make, cls=CustomTrainer, *, model, data, batch, accumulation, **options):
    """The loss and the gradient of one optimizer step, as the trainer computed them."""
    seen = {}

    class Spy(cls):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen["loss"] = seen.get("loss", 0) + loss
            return loss

        def _clip_grad_norm(self, model):
            seen["gradient"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return super()._clip_grad_norm(model)

    run = make(
        Spy,
        model=copy.deepcopy(model),
        train=data,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    run.train()
    return seen["loss"], seen["gradient"]


def oracle(model, data, order, weights):
    """One big batch through `CrossEntropyLoss(weight=w)` and autograd."""
    model = copy.deepcopy(model).train()
    batch = default_data_collator([data[i] for i in order])
    labels = batch.pop("labels")
    logits = model(**batch).logits
    weight = None if weights is None else torch.tensor(weights, dtype=logits.dtype)
    loss = nn.CrossEntropyLoss(weight=weight)(logits.view(-1, logits.shape[-1]), labels.view(-1))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def first_rows(data, count):
    """The rows of the first step; their micro-batches of four must differ in weight, or splits would all agree."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(42)).tolist()[:count]
    labels = [data[i]["labels"] for i in order]
    if isinstance(labels[0], int):
        assert len({sum(labels[i : i + 4]) for i in range(0, len(labels) - 3, 4)}) > 1
    return order


def assert_same(found, expected, tolerance):
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    scale = max(g.abs().max() for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_step_is_one_big_batch(trainer, dtype, batch, accumulation, weights, tokens):
    model, data = tiny_model(dropout=0.0, dtype=dtype, tokens=tokens), rows(tokens=tokens)
    found = first_step(trainer, model=model, data=data, batch=batch, accumulation=accumulation, class_weights=weights)
    assert_same(found, oracle(model, data, first_rows(data, 16), weights), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_ragged_tail_is_one_big_batch_too(trainer, dtype):
    """11 rows as 4 x 4: three micro-batches, the last of 3 rows."""
    model, data = tiny_model(dropout=0.0, dtype=dtype), rows(11)
    found = first_step(trainer, model=model, data=data, batch=4, accumulation=4, class_weights=WEIGHTS)
    assert_same(found, oracle(model, data, first_rows(data, 11), WEIGHTS), TOLERANCE[dtype])


def test_the_stock_trainer_is_off_by_the_accumulation_steps(trainer):
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    options = {"model": model, "data": data, "batch": 4, "accumulation": 4}
    loss, gradient = first_step(trainer, Trainer, **options)
    true_loss, true_gradient = oracle(model, data, first_rows(data, 16), None)
    assert abs(loss / true_loss - 4) < 1e-6
    norms = [torch.stack([g.norm() for g in grads.values()]).norm() for grads in (gradient, true_gradient)]
    assert abs(norms[0] / norms[1] - 4) < 1e-6


def test_a_tutorial_override_is_a_mean_of_means(trainer):
    """The mutation that the exactness above would catch."""

    class Tutorial(CustomTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            weight = torch.tensor(WEIGHTS, dtype=outputs.logits.dtype)
            loss = nn.CrossEntropyLoss(weight=weight)(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    found = first_step(trainer, Tutorial, model=model, data=data, batch=4, accumulation=4)
    with pytest.raises(AssertionError):
        assert_same(found, oracle(model, data, first_rows(data, 16), WEIGHTS), TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_models_own_loss_is_exact_too(trainer, num_labels):
    data = rows(num_labels=3)
    if num_labels == 1:
        data = data.cast_column("labels", Value("float32"))
    model = tiny_model(dropout=0.0, num_labels=num_labels)
    steps = [
        first_step(trainer, model=model, data=data, batch=batch, accumulation=accumulation, loss="model")
        for batch, accumulation in [(16, 1), (4, 4)]
    ]
    assert_same(steps[1], steps[0], 1e-5)


def test_a_causal_language_model_is_exact(trainer):
    torch.manual_seed(0)
    options = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2, **options))
    data = rows(16)
    labels = [[-100 if i % 3 and j > i % 7 else t for j, t in enumerate(r["input_ids"])] for i, r in enumerate(data)]
    data = data.remove_columns("labels").add_column("labels", labels)
    whole = first_step(trainer, model=model, data=data, batch=16, accumulation=1)
    split = first_step(trainer, model=model, data=data, batch=4, accumulation=4)
    assert_same(split, whole, 1e-5)


def test_both_ends_of_an_answer_are_counted(trainer):
    """Question answering; answers outside the text do not count, and fall unequally on the micro-batches."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    data = rows(16).remove_columns("labels")
    outside = torch.randperm(16, generator=torch.Generator().manual_seed(42)).tolist()[:3]  # all in the first four
    data = data.add_column("start_positions", [8 if i in outside else i % 8 for i in range(16)])
    data = data.add_column("end_positions", [8 if i in outside else 7 - i % 8 for i in range(16)])
    whole = first_step(trainer, model=model, data=data, batch=16, accumulation=1)
    split = first_step(trainer, model=model, data=data, batch=4, accumulation=4)
    assert_same(split, whole, 1e-5)
    own = model.train()(**default_data_collator(list(data)))
    own.loss.backward()
    assert_same(
        whole, (own.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), 1e-5
    )


def test_a_head_with_two_kinds_of_labels_is_a_mean_of_means_and_says_so(trainer):
    """Pretraining BERT goes by two columns of labels: equal micro-batches are exact, and a warning tells."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    data = rows(16)
    data = data.rename_column("labels", "next_sentence_label").add_column("labels", data["input_ids"])
    with pytest.warns(UserWarning, match="mean of the micro-batches' means"):
        whole = first_step(trainer, model=model, data=data, batch=16, accumulation=1)
    with pytest.warns(UserWarning, match="exact where they are of one size"):
        split = first_step(trainer, model=model, data=data, batch=4, accumulation=4)
    assert_same(split, whole, 1e-5)


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
def test_reductions(trainer, reduction):
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    loss, _ = first_step(
        trainer, model=model, data=data, batch=4, accumulation=4, class_weights=WEIGHTS, loss_reduction=reduction
    )
    order = first_rows(data, 16)
    mean, _ = oracle(model, data, order, WEIGHTS)
    total = sum(WEIGHTS[data[i]["labels"]] for i in order)
    expected = mean if reduction == "weighted_mean" else mean * total / 16
    assert abs(loss - expected) < 1e-12


def test_label_smoothing_is_pytorchs(trainer):
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    loss, _ = first_step(
        trainer, model=model, data=data, batch=4, accumulation=4, class_weights=WEIGHTS, label_smoothing_factor=0.2
    )
    batch = default_data_collator([data[i] for i in first_rows(data, 16)])
    labels = batch.pop("labels")
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2)(model(**batch).logits, labels)
    assert abs(loss - expected) < 1e-12


def test_eval_loss_is_one_number_for_every_batch_size(trainer):
    data, model = rows(408), tiny_model(dtype=torch.float64)  # as many as MRPC's validation split has
    found = [
        trainer(model=model, evaluation=data, per_device_eval_batch_size=size, class_weights=WEIGHTS).evaluate()[
            "eval_loss"
        ]
        for size in (1, 2, 4, 8, 32, 64, 408)
    ]
    batch = default_data_collator(list(data))
    labels = batch.pop("labels")
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = nn.CrossEntropyLoss(weight=weight)(model.eval()(**batch).logits, labels).item()
    assert max(abs(value - expected) for value in found) < 1e-12


def test_a_step_without_any_label_changes_nothing_and_is_not_nan(trainer):
    data = rows(8, tokens=True)
    data = data.remove_columns("labels").add_column("labels", [[-100] * 8] * 8)
    model = tiny_model(tokens=True)
    before = copy.deepcopy(model.state_dict())
    run = trainer(model=model, train=data, max_steps=2, gradient_accumulation_steps=2, class_weights=WEIGHTS)
    run.train()
    assert logged(run) == [0.0, 0.0]
    assert logged(run, "grad_norm") == [0.0, 0.0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Liar:
    """A loss whose announcement is not what it returns."""

    def __call__(self, logits, labels, **options):
        terms = cross_entropy(logits, labels, **options)
        return LossTerms(terms.numerator, terms.denominator * 2)

    def denominator(self, labels, **options):
        return cross_entropy.denominator(labels, **options)


def test_a_denominator_other_than_announced_is_an_error(arguments):
    run = CustomTrainer(
        model=tiny_model(), args=arguments(), train_dataset=rows(), data_collator=default_data_collator, loss=Liar()
    )
    with pytest.raises(ValueError, match=r"Liar came with the denominator 16, and its denominator\(\) says 8"):
        run.train()


def test_a_nan_loss_is_logged_as_it_is(trainer):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    run = trainer(model=model, max_steps=1, on_non_finite="ignore")
    run.train()
    assert logged(run)[0] != logged(run)[0]
