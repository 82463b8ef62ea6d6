"""An evaluation that gathers only what is read, over sorted rows: against float64 loops over single rows without padding,
scikit-learn, and the stock Trainer."""

import copy

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef, roc_auc_score
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from tests.callbacks.processes import run_ranks
from tests.evaluation_run import CLASSES, Watch, classifier, evaluated_on_ranks, make, ragged_rows
from trainer_ext import CustomTrainer
from trainer_ext.evaluated_rows import put_together
from trainer_ext.metrics import compute_metrics

STOCK = {"cls": Trainer, "arguments_class": TrainingArguments}
TOLERANCE = 1e-12
IN_ORDER = list(range(21))


def close(a, b, tolerance=TOLERANCE):
    """Not far apart, and not NaN."""
    return bool(np.all(np.abs(np.asarray(a) - np.asarray(b)) <= tolerance))


def row_by_row(data, model):
    """Logits and labels of each row alone, unpadded, in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in data]
    return logits, [np.asarray(row["labels"]) for row in data]


def expected(data, model, tokens):
    """The loss and metrics from the single rows."""
    logits, labels = row_by_row(data, model)
    scores, true = (np.concatenate(x) if tokens else np.stack(x) for x in (logits, labels))
    scores, true = scores[true != -100], true[true != -100]
    powers = np.exp(scores - scores.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    predicted = scores.argmax(1)
    return {
        "loss": -np.log(shares[np.arange(len(true)), true]).mean(),
        "accuracy": accuracy_score(true, predicted),
        "f1": f1_score(true, predicted, average="macro"),
        "balanced_accuracy": balanced_accuracy_score(true, predicted),
        "mcc": matthews_corrcoef(true, predicted),
        "auroc": roc_auc_score(true, shares, multi_class="ovr", average="macro"),
    }


def holds(found, wanted):
    return [name for name in wanted if not close(found[f"eval_{name}"], wanted[name])] == []


@pytest.mark.parametrize("tokens", [False, True])
def test_loss_and_metrics_are_those_of_single_rows(tmp_path, tokens):
    data, model = ragged_rows(tokens=tokens), classifier(tokens=tokens)
    wanted = expected(data, model, tokens)
    assert 0.1 < wanted["accuracy"] < 0.9
    for metrics in (("accuracy", "f1", "mcc", "balanced_accuracy"), "all"):
        trainer = make(tmp_path, data, model, trainer={"compute_metrics": compute_metrics(CLASSES, metrics)})
        watch = Watch(trainer)
        found = trainer.evaluate()
        keys = [name for name in wanted if metrics == "all" or name in ("loss", *metrics)]
        assert holds(found, {name: wanted[name] for name in keys})
        assert watch.gathered == []
        assert watch.widths == sorted(watch.widths, reverse=True)
        assert sorted(watch.drawn) == IN_ORDER != watch.drawn
        assert next(iter(found)) == "eval_loss"
        assert not holds(found, {"loss": wanted["loss"] * (1 + 1e-9)})
    assert trainer.compute_metrics.last is not None


def test_a_batch_left_out_of_the_counts_is_seen(tmp_path, monkeypatch):
    data, model = ragged_rows(), classifier()
    trainer = make(tmp_path, data, model, trainer={"compute_metrics": compute_metrics(CLASSES)})
    monkeypatch.setattr("trainer_ext.lean_evaluation.count_real_rows", lambda rows, loader: rows - 1)
    found = trainer.evaluate()
    wanted = expected(data, model, tokens=False)
    assert holds(found, {"loss": wanted["loss"]})
    assert not holds(found, {"accuracy": wanted["accuracy"]})


def test_without_metrics_nothing_is_gathered_and_the_stock_gathers_losses(tmp_path):
    for options, gathers in (({}, False), (STOCK, True)):
        trainer = make(tmp_path, ragged_rows(), classifier(), **options)
        watch = Watch(trainer)
        trainer.evaluate()
        assert bool(watch.gathered) == gathers


@pytest.mark.parametrize("tokens", [False, True])
def test_predictions_are_in_the_datasets_order(tmp_path, tokens, monkeypatch):
    data, model = ragged_rows(tokens=tokens), classifier(tokens=tokens)
    trainer = make(tmp_path, data, model)
    watch = Watch(trainer)

    def right():
        found, (logits, labels) = trainer.predict(data), row_by_row(data, model)
        parts = zip(found.predictions, found.label_ids, logits, labels, strict=True)
        if not tokens:
            return all(close(got, row) and label == own for got, label, row, own in parts)
        return all(
            close(got[: len(row)], row) and label.tolist() == [*own, *[-100] * (len(label) - len(own))]
            for got, label, row, own in parts
        )

    assert right()
    assert watch.drawn != IN_ORDER
    monkeypatch.setattr("trainer_ext.lean_evaluation.put_together", lambda batches, order: put_together(batches, None))
    assert not right()


@pytest.mark.parametrize("tokens", [False, True])
def test_a_users_metrics_get_what_the_stock_trainer_gives_them(tmp_path, tokens):
    """To the bit where rows are not sorted, padding and all; within rounding, outside the padding, where they are."""
    seen = []
    data = ragged_rows(tokens=tokens)

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids, prediction.inputs))
        return {"rows": len(prediction.predictions)}

    for options in (STOCK, {"sort_eval_by_length": False}, {}):
        for steps in (None, 2):
            model = classifier(tokens=tokens, dtype=torch.float32)
            more = {"include_for_metrics": ["inputs"], "eval_accumulation_steps": steps}
            trainer = make(tmp_path, data, model, trainer={"compute_metrics": metrics}, **options, **more)
            assert trainer.evaluate()["eval_rows"] == 21
            assert trainer.args.eval_do_concat_batches
            assert trainer.compute_metrics is metrics
    stock, *others = seen
    for other in others[:3]:
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(stock, other, strict=True))
    for scores, labels, inputs in others[3:]:
        assert np.array_equal(labels, stock[1])
        real = inputs > 0
        assert np.array_equal(real, stock[2] > 0)
        assert np.array_equal(inputs[real], stock[2][real])
        assert scores.shape == stock[0].shape
        which = real if tokens else slice(None)
        assert close(scores[which], stock[0][which], 1e-5)
        assert not np.array_equal(scores, stock[0])


def test_metrics_may_predict_and_find_the_trainer_as_it_was(tmp_path):
    data, model = ragged_rows(), classifier()
    other = ragged_rows(9, seed=3)

    def metrics(prediction):
        inner = trainer.predict(other)
        assert all(close(a, b) for a, b in zip(inner.predictions, row_by_row(other, model)[0], strict=True))
        return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(1))}

    trainer = make(tmp_path, data, model)
    trainer.compute_metrics = lambda prediction: (
        {"inner": 0.0} if len(prediction.label_ids) == 9 else metrics(prediction)
    )
    wanted = expected(data, model, tokens=False)
    assert holds(trainer.evaluate(), {name: wanted[name] for name in ("loss", "accuracy")})


class OwnSampler(CustomTrainer):
    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)


class OwnLoader(CustomTrainer):
    def get_eval_dataloader(self, eval_dataset=None):
        return list(super().get_eval_dataloader(eval_dataset))


class OwnLoss(CustomTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(CustomTrainer):
    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        assert loss is not None
        return loss, logits, labels


def streamed(data):
    return IterableDataset.from_generator(lambda: iter(list(data)))


STOCK_WAYS = {
    "switched off": ({"sort_eval_by_length": False}, None),
    "drop last": ({"dataloader_drop_last": True}, None),
    "losses for metrics": ({"include_for_metrics": ["loss"]}, None),
    "batches kept apart": ({"eval_do_concat_batches": False}, None),
    "own sampler": ({"cls": OwnSampler}, None),
    "own loader": ({"cls": OwnLoader}, None),
    "own loss": ({"cls": OwnLoss}, None),
    "stream": ({}, streamed),
    "rows made on the way": ({}, lambda data: data.with_transform(lambda batch: batch)),
    "a list": ({}, list),
}


@pytest.mark.parametrize("way", STOCK_WAYS)
def test_rows_are_drawn_in_order_where_more_than_rounding_could_depend_on_it(tmp_path, way):
    options, changed = STOCK_WAYS[way]
    data = ragged_rows() if changed is None else changed(ragged_rows())
    apart = way == "batches kept apart"
    metrics = None if apart else compute_metrics(CLASSES)
    trainer = make(tmp_path, data, classifier(), trainer={"compute_metrics": metrics}, **options)
    watch = Watch(trainer)
    if not apart:
        found = trainer.evaluate()
        assert watch.drawn == (IN_ORDER[:20] if way == "drop last" else IN_ORDER)
        rows = ragged_rows().select(watch.drawn)
        wanted = expected(rows, trainer.model, tokens=False)
        keys = ("accuracy", "f1") if way == "own loss" else ("loss", "accuracy", "f1")
        assert holds(found, {name: wanted[name] for name in keys})
    else:
        assert [len(batch) for batch in trainer.predict(data).predictions] == [4, 4, 4, 4, 4, 1]
        assert watch.drawn == IN_ORDER


def test_a_subclass_sees_the_loss_in_its_own_step(tmp_path):
    trainer = make(tmp_path, ragged_rows(), classifier(), cls=OwnStep)
    assert holds(trainer.evaluate(), {"loss": expected(ragged_rows(), trainer.model, tokens=False)["loss"]})


def test_a_loader_gives_its_rows_in_order_to_anybody_else(tmp_path):
    trainer = make(tmp_path, ragged_rows(), classifier(), train_sampling_strategy="group_by_length")
    for _ in range(2):
        firsts = [row[0].item() - 5 for batch in trainer.get_eval_dataloader() for row in batch["input_ids"]]
        assert firsts == IN_ORDER
        trainer.evaluate()


def batches_of(scores, labels, sizes):
    ends = np.cumsum(sizes)[:-1]
    return zip(np.split(scores, ends), np.split(labels, ends), strict=True)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_counts_are_the_metrics_of_all_rows(multi_label, dtype):
    random = np.random.default_rng(0)
    scores = torch.tensor(random.normal(size=(50, 4)).round(1)).to(dtype)
    scores[7] = float("nan")
    scores[11] = 0.0
    labels = random.integers(0, 2, (50, 4)) if multi_label else random.integers(-1, 4, 50)
    labels = np.where(labels < 0, -100, labels)
    named = ("accuracy", "f1", "f1_macro", "f1_micro", "precision", "recall")
    named += () if multi_label else ("mcc", "balanced_accuracy")
    compute = compute_metrics(4, named, multi_label=multi_label)
    running, short = compute.running_metrics(), compute.running_metrics()
    for k, (part, of_it) in enumerate(batches_of(scores, labels, [1, 20, 0, 9, 20])):
        for metrics in (running, short)[: 1 if k == 3 else 2]:
            metrics.add(part, torch.tensor(of_it))
    found = running.result(lambda value: value, list)
    assert compute.last is None
    assert found == compute.of(scores.float().numpy(), labels)
    assert found != short.result(lambda value: value, list)


@pytest.mark.parametrize("bad", [7, -1, 0.5])
def test_a_label_that_is_no_class_is_named(bad):
    running = compute_metrics(CLASSES).running_metrics()
    running.add(torch.zeros(3, CLASSES), torch.tensor([0, bad, -100]))
    with pytest.raises(ValueError, match="1 labels are none of 0 to 2"):
        running.result(lambda value: value, list)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"logits of shape \(3, 2\) and labels of shape \(3,\) do not fit: 3 classes"):
        compute_metrics(CLASSES).running_metrics().add(torch.zeros(3, 2), torch.zeros(3))


def test_batches_are_put_together_as_the_stock_does():
    random = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, w, 2, generator=random), {"hidden": torch.randn(n, generator=random), "once": torch.ones(1)})
        for n, w in ((4, 3), (4, 7), (2, 1))
    ]
    stock = batches[0]
    for batch in batches[1:]:
        stock = nested_concat(stock, batch)
    order = np.array([3, 9, 1, 0, 7, 2, 4, 8, 6, 5])
    for places in (None, order):
        whole, named = put_together(nested_numpify(list(batches)), places)
        wanted = nested_numpify(stock)
        assert np.array_equal(named["once"], wanted[1]["once"])
        rows = slice(None) if places is None else places
        assert np.array_equal(whole[rows], wanted[0])
        assert np.array_equal(named["hidden"][rows], wanted[1]["hidden"])


def test_two_ranks_find_what_one_process_finds(tmp_path):
    """21 rows in batches of 4: the last round has five, and the loader repeats three."""
    ranks = run_ranks(evaluated_on_ranks, 2, str(tmp_path), timeout=300)
    for tokens in (False, True):
        data, model = ragged_rows(tokens=tokens), classifier(tokens=tokens)
        wanted = expected(data, model, tokens)
        for metrics in ("counted", "all"):
            for found in (rank[tokens, metrics] for rank in ranks):
                assert found["world"] == (2, "MULTI_CPU")
                assert found["gathered"] == []
                assert len(found["drawn"]) == 12
                keys = [name for name in wanted if f"eval_{name}" in found["metrics"]]
                assert len(keys) == (6 if metrics == "all" else 4)
                assert holds(found["metrics"], {name: wanted[name] for name in keys})
            assert ranks[0][tokens, metrics]["metrics"] == ranks[1][tokens, metrics]["metrics"]
        assert sorted({*ranks[0][tokens, "all"]["drawn"], *ranks[1][tokens, "all"]["drawn"]}) == IN_ORDER
        logits, labels = row_by_row(data, model)
        for scores, given, gathered in (rank[tokens, "predicted"] for rank in ranks):
            assert len(scores) == len(given) == 21
            assert all(close(a[: len(b)] if tokens else a, b) for a, b in zip(scores, logits, strict=True))
            assert all(np.array_equal(a[: b.size] if tokens else a, b) for a, b in zip(given, labels, strict=True))
            assert [shape[0] for shape in gathered] == [8, 8, 8, 8, 5, 5]
