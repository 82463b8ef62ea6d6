"""Accuracy and F1 against values worked out by hand, and what a Trainer hands over."""

from types import SimpleNamespace

import evaluate
import numpy as np
import pytest

from trainer_ext.metrics import AccuracyAndF1, compute_metrics

# Two classes: 2 true positives, 1 false positive, 1 false negative, 1 true negative.
PREDICTED, TRUE = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
BINARY = {"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1)}
# Three classes: F1 of class 0 is 2/3 (1 tp, 1 fp), of class 1 is 0 (1 fn), of class 2 is 1.
PREDICTED_3, TRUE_3 = [0, 0, 2, 2], [0, 1, 2, 2]
MACRO = {"accuracy": 3 / 4, "f1": (2 / 3 + 0 + 1) / 3}


def logits(classes, num_labels):
    return np.eye(num_labels)[np.array(classes)] * 3 - 1


def test_binary_is_the_f1_of_class_1():
    assert AccuracyAndF1().compute(predictions=PREDICTED, references=TRUE) == pytest.approx(BINARY)


def test_more_classes_are_the_mean_over_classes():
    assert AccuracyAndF1(3).compute(predictions=PREDICTED_3, references=TRUE_3) == pytest.approx(MACRO)


def test_a_class_that_does_not_occur_does_not_count():
    metrics = AccuracyAndF1(4).compute(predictions=PREDICTED_3, references=TRUE_3)
    assert metrics == pytest.approx(MACRO)


def test_no_positive_at_all_is_0_without_a_warning():
    assert AccuracyAndF1().compute(predictions=[0, 0], references=[0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_batches_add_up_and_every_use_starts_anew():
    metric = AccuracyAndF1()
    for _ in range(2):
        metric.add_batch(predictions=PREDICTED[:2], references=TRUE[:2])
        metric.add_batch(predictions=np.array(PREDICTED[2:]), references=np.array(TRUE[2:]))
        assert metric.compute() == pytest.approx(BINARY)
    metric.add(prediction=1, reference=0)
    assert metric.compute() == {"accuracy": 0.0, "f1": 0.0}


def test_two_metrics_at_once_do_not_mix():
    first, second = AccuracyAndF1(), AccuracyAndF1(3)
    first.add_batch(predictions=PREDICTED, references=TRUE)
    second.add_batch(predictions=PREDICTED_3, references=TRUE_3)
    assert first.compute() == pytest.approx(BINARY)
    assert second.compute() == pytest.approx(MACRO)


def test_it_is_a_metric_of_evaluate_and_writes_no_file(tmp_path):
    metric = AccuracyAndF1(cache_dir=str(tmp_path))
    metric.add_batch(predictions=PREDICTED, references=TRUE)
    metric.compute()
    assert isinstance(metric, evaluate.Metric)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_lengths_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"predictions.*1.*references.*2"):
        AccuracyAndF1().compute(predictions=[1], references=[1, 0])


def test_compute_metrics_takes_the_largest_logit():
    prediction = SimpleNamespace(predictions=logits(PREDICTED, 2), label_ids=np.array(TRUE))
    compute = compute_metrics()
    assert compute(prediction) == pytest.approx(BINARY)
    assert compute(prediction) == pytest.approx(BINARY)


def test_compute_metrics_takes_the_first_of_several_outputs():
    outputs = (logits(PREDICTED_3, 3), np.zeros((4, 7)))
    assert compute_metrics(3)(SimpleNamespace(predictions=outputs, label_ids=np.array(TRUE_3))) == pytest.approx(MACRO)


def test_ignored_labels_are_left_out():
    prediction = SimpleNamespace(predictions=logits([*PREDICTED, 1, 0], 2), label_ids=np.array([*TRUE, -100, -100]))
    assert compute_metrics()(prediction) == pytest.approx(BINARY)


def test_tokens_count_one_by_one():
    """Logits (2, 3, C) and labels (2, 3), the second row padded by two."""
    labels = np.array([[*TRUE_3[:3]], [TRUE_3[3], -100, -100]])
    predicted = logits([[*PREDICTED_3[:3]], [PREDICTED_3[3], 0, 1]], 3)
    assert predicted.shape == (2, 3, 3)
    assert compute_metrics(3)(SimpleNamespace(predictions=predicted, label_ids=labels)) == pytest.approx(MACRO)
