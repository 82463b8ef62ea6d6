"""Metrics against values worked out by hand and by counting, and what a Trainer hands over."""

import math
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest

from trainer_ext.metrics import METRICS, AccuracyAndF1, ClassificationMetrics, compute_metrics

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


def evaluated(scores, labels, *, metrics="all", **options):
    prediction = SimpleNamespace(predictions=scores, label_ids=np.asarray(labels))
    return compute_metrics(np.shape(scores)[-1], metrics, **options)(prediction)


def drawn(num_labels, *, count=83, seed=0, decimals=1):
    """Logits that are often right, with ties, beside references of unequal classes."""
    random = np.random.default_rng(seed)
    labels = random.choice(num_labels, size=count, p=np.arange(1, num_labels + 1) / sum(range(num_labels + 1)))
    scores = random.normal(size=(count, num_labels)) + 1.3 * np.eye(num_labels)[labels]
    return np.round(scores, decimals).astype("float32"), labels


def softmax(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def share_in_order(of_it, scores):
    """AUROC by its meaning: pairs of a positive and a negative in order, a tie being half."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[of_it] for n in scores[~of_it]]
    return sum(pairs) / len(pairs)


def sum_of_steps(of_it, scores):
    """Average precision by its definition: at each distinct score, the rise of recall times the precision."""
    total, last = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        hits = int(of_it[scores >= threshold].sum())
        recall, precision = hits / int(of_it.sum()), hits / int((scores >= threshold).sum())
        total, last = total + (recall - last) * precision, recall
    return total


def calibration_by_a_loop(scores, labels):
    rows = [(max(p), p.index(max(p)) == label) for p, label in zip(map(softmax, scores.tolist()), labels, strict=True)]
    total = 0.0
    for m in range(15):
        inside = [(c, right) for c, right in rows if m / 15 < c <= (m + 1) / 15]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


def by_counting(scores, labels):
    """Every metric of rows with one label, from counts and loops over pairs and thresholds."""
    C, count = scores.shape[1], len(labels)
    predicted = [row.index(max(row)) for row in scores.tolist()]
    cells = np.zeros((C, C))
    for true, guess in zip(labels, predicted, strict=True):
        cells[true, guess] += 1
    true, guessed, hits = cells.sum(1), cells.sum(0), np.diag(cells)
    f1 = 2 * hits / (true + guessed)
    spread = (count**2 - (guessed**2).sum()) * (count**2 - (true**2).sum())
    of_it = [np.array(labels) == c for c in range(C)]
    probabilities = np.array([softmax(row) for row in scores.tolist()])
    order = [scores[:, 1].astype(float) - scores[:, 0]] if C == 2 else list(probabilities.T)
    of_it = of_it[1:] if C == 2 else of_it
    return {
        "accuracy": hits.sum() / count,
        "balanced_accuracy": (hits / true).mean(),
        "f1": f1[1] if C == 2 else f1.mean(),
        "f1_macro": f1.mean(),
        "f1_micro": hits.sum() / count,
        "mcc": (hits.sum() * count - (true * guessed).sum()) / math.sqrt(spread),
        "auroc": np.mean([share_in_order(*curve) for curve in zip(of_it, order, strict=True)]),
        "average_precision": np.mean([sum_of_steps(*curve) for curve in zip(of_it, order, strict=True)]),
        "calibration_error": calibration_by_a_loop(scores, labels),
        **{f"precision_{c}": hits[c] / guessed[c] for c in range(C)},
        **{f"recall_{c}": hits[c] / true[c] for c in range(C)},
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_every_metric_is_what_counting_gives(num_labels, seed):
    scores, labels = drawn(num_labels, seed=seed)
    expected = by_counting(scores, labels)
    assert len({round(value, 9) for value in expected.values()}) >= len(expected) - 4  # few agree by chance
    found = evaluated(scores, labels)
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_two_classes_by_hand():
    """Differences of the logits 3, 1, 1, -2 beside 1, 1, 0, 0: of four pairs three in order, and a tie."""
    found = evaluated(np.array([[0.0, 3], [0, 1], [0, 1], [2, 0]]), [1, 1, 0, 0])
    assert found["auroc"] == 3.5 / 4
    assert found["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["mcc"] == pytest.approx((2 * 1 - 1 * 0) / math.sqrt(3 * 2 * 2 * 1))
    assert (found["precision_0"], found["precision_1"], found["recall_0"], found["recall_1"]) == (1, 2 / 3, 0.5, 1)
    assert (found["balanced_accuracy"], found["f1_macro"], found["f1_micro"]) == (0.75, (2 / 3 + 0.8) / 2, 0.75)


@pytest.mark.parametrize(("confidence", "expected"), [(0.8, 0.55), (0.6, 0.35), (0.9, 0.65)])
def test_one_bin_of_confidence(confidence, expected):
    """One of four rows is right at this confidence."""
    scores = np.log([[confidence, 1 - confidence]] * 4)
    assert evaluated(scores, [0, 1, 1, 1])["calibration_error"] == pytest.approx(expected)


def test_bins_of_confidence_are_closed_above_and_weighted_by_their_rows():
    """The edge 12/15 = 0.8 belongs with 0.78, where two rows that are wrong and right cancel in part; 0.82 does not."""
    confidence = np.array([0.78, 0.8, 0.82])
    scores = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    edge = np.exp(scores[1]) / np.exp(scores[1]).sum()
    assert edge[0] <= 12 / 15
    found = evaluated(scores, [1, 0, 0])["calibration_error"]
    assert found == pytest.approx(2 / 3 * abs(1 / 2 - 0.79) + 1 / 3 * abs(1 - 0.82))


@pytest.mark.parametrize("num_labels", [2, 4])
def test_perfect_predictions(num_labels):
    labels = [*range(num_labels)] * 3
    found = evaluated(logits(labels, num_labels) * 400, labels)
    assert found.pop("calibration_error") == pytest.approx(0, abs=1e-12)
    assert found == dict.fromkeys(found, 1.0)
    assert len(found) == len(METRICS) - 3 + 2 * num_labels


def test_what_the_split_does_not_define_is_left_out():
    """One class: no pair to put in order, no correlation, no recall of the others."""
    undefined = {"auroc", "mcc", "average_precision", "recall_1"}
    assert evaluated(logits([0, 1], 2), [0, 0]).keys() == evaluated(logits([0, 1], 2), [0, 1]).keys() - undefined
    assert evaluated(logits([0, 1], 2), [1, 1])["average_precision"] == 1.0
    assert "auroc" not in evaluated(logits([2, 1, 1], 3), [2, 2, 2])
    assert "mcc" not in evaluated(logits([2, 1, 1], 3), [2, 2, 2])


def test_the_keys_do_not_depend_on_what_was_predicted():
    """Always the commonest class, as a model does that has yet to learn: 0 instead of nothing."""
    found = evaluated(logits([0, 0, 0, 0], 2), [0, 0, 0, 1])
    assert found.keys() == evaluated(logits([0, 1, 0, 1], 2), [0, 0, 0, 1]).keys()
    assert (found["mcc"], found["precision_1"], found["recall_1"], found["f1"]) == (0, 0, 0, 0)
    assert (found["auroc"], found["average_precision"], found["balanced_accuracy"]) == (0.5, 0.25, 0.5)


def test_a_class_that_does_not_occur_is_in_no_mean():
    scores, labels = drawn(3)
    wider = np.concatenate([scores, np.full((len(scores), 1), -np.inf)], axis=1)
    narrow, wide = evaluated(scores, labels), evaluated(wider, labels)
    assert wide.pop("precision_3") == 0
    assert wide == pytest.approx(narrow)


def test_a_class_that_is_predicted_and_does_not_occur():
    found = evaluated(logits([0, 1, 2], 3), [0, 1, 1])
    assert found["balanced_accuracy"] == 0.75
    assert found["f1"] == found["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["precision_2"] == 0
    assert "recall_2" not in found


def test_a_single_row():
    found = evaluated(np.array([[0.0, math.log(3)]]), [1])
    one = dict.fromkeys(("accuracy", "balanced_accuracy", "f1", "f1_macro", "f1_micro", "average_precision"), 1.0)
    assert found == pytest.approx(
        {**one, "calibration_error": 0.25, "precision_0": 0, "precision_1": 1, "recall_1": 1}
    )


def test_without_a_row_there_is_no_metric():
    assert evaluated(logits([0, 1], 2), [-100, -100]) == {}


def test_saturated_probabilities_still_have_an_order():
    """Both probabilities of class 1 are 1.0 in float64, and the logits tell the rows apart."""
    assert evaluated(np.array([[0, 60.0], [0, 50.0]]), [1, 0])["auroc"] == 1.0


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_give_nan_where_they_matter(bad, num_labels):
    scores, labels = drawn(num_labels)
    scores[4, :] = bad
    found = evaluated(scores, labels)
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "auroc",
        "average_precision",
        "calibration_error",
    }
    guesses = AccuracyAndF1(num_labels).compute(predictions=np.argmax(scores, axis=-1), references=labels)
    assert guesses == {name: found[name] for name in guesses}


def test_half_precision_is_counted_in_double():
    scores, labels = drawn(3)
    half = evaluated(scores.astype("float16"), labels)
    assert half == evaluated(scores.astype("float16").astype("float64"), labels)


def test_the_default_is_accuracy_and_f1_to_the_bit():
    for num_labels in (2, 3, 7):
        scores, labels = drawn(num_labels, count=997)
        metric = AccuracyAndF1(num_labels)
        for part in np.array_split(np.arange(997), 9):
            metric.add_batch(predictions=np.argmax(scores[part], axis=-1), references=labels[part])
        expected = metric.compute()
        prediction = SimpleNamespace(predictions=scores, label_ids=labels)
        assert list(expected) == list(compute_metrics(num_labels)(prediction)) == ["accuracy", "f1"]
        assert compute_metrics(num_labels)(prediction) == expected
        assert {name: evaluated(scores, labels)[name] for name in expected} == expected


def test_all_metrics_of_tokens_and_of_several_outputs():
    scores, labels = drawn(3, count=24)
    padded = np.concatenate([labels.reshape(4, 6), np.full((4, 2), -100)], axis=1)
    wide = np.concatenate([scores.reshape(4, 6, 3), np.full((4, 2, 3), math.nan)], axis=1)
    prediction = SimpleNamespace(predictions=(wide, np.zeros(5)), label_ids=padded)
    assert compute_metrics(3, "all")(prediction) == evaluated(scores, labels)


def test_keys_bear_the_names_of_the_classes():
    found = evaluated(
        logits([0, 1], 2), [0, 1], metrics=["recall", "mcc"], label_names=["not_equivalent", "equivalent"]
    )
    assert found == {"recall_not_equivalent": 1.0, "recall_equivalent": 1.0, "mcc": 1.0}
    assert evaluated(logits([0, 1], 2), [0, 1], metrics="mcc") == {"mcc": 1.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"metrics": ["accuracy", "aurok"]},
            r"'aurok' is not known. Choices: all, accuracy, balanced_accuracy, .*recall",
        ),
        (
            {"metrics": "mcc", "multi_label": True},
            "'mcc' of several labels a row is not known. Choices: all, accuracy, f1",
        ),
        ({"label_names": ["a", "b"]}, "each of the 3 classes"),
        ({"label_names": ["a", "b", "a"]}, "each of the 3 classes"),
    ],
)
def test_a_mistake_is_named_at_once(options, says):
    for make in (compute_metrics, ClassificationMetrics):
        with pytest.raises(ValueError, match=says):
            make(3, **options)


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [
        ((4, 2), [0, 1, 2, 0], r"\(4, 2\).*\(4,\) do not fit: 3 classes need logits \(N, 3\) and labels \(N,\)"),
        ((3, 3), [0, 1, 2, 0], r"\(3, 3\) and labels of shape \(4,\)"),
        ((4,), [0, 1, 2, 0], "do not fit"),
        ((3,), 1, "do not fit"),
        ((4, 3), [0, -100, 2, 3], "label 3 in row 3 is none of 0 to 2, nor -100"),
        ((4, 3), [0, -1, 2, 2], "label -1 in row 1"),
    ],
)
def test_what_does_not_fit_is_an_error(shape, labels, says):
    with pytest.raises(ValueError, match=says):
        compute_metrics(3)(SimpleNamespace(predictions=np.zeros(shape), label_ids=np.array(labels)))


def test_it_keeps_the_predictions_of_the_last_evaluation():
    compute = compute_metrics(2)
    assert compute.last is None
    for labels in ([0, 1, 1, -100], [1, 0, 0, 0]):
        compute(SimpleNamespace(predictions=logits([0, 1, 0, 1], 2), label_ids=np.array(labels)))
        assert compute.last.references.tolist() == [label for label in labels if label >= 0]


def test_classification_metrics_is_a_metric_of_evaluate(tmp_path):
    scores, labels = drawn(3)
    metric = ClassificationMetrics(3, label_names=["a", "b", "c"], cache_dir=str(tmp_path))
    expected = evaluated(scores, labels, label_names=["a", "b", "c"])
    for _ in range(2):
        metric.add_batch(predictions=scores[:50], references=labels[:50])
        metric.add_batch(predictions=scores[50:].tolist(), references=labels[50:].tolist())
        assert metric.compute() == expected
    assert metric.compute(predictions=scores, references=labels) == expected
    assert isinstance(metric, evaluate.Metric)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_rows_whose_logits_are_in_another_order_are_tied():
    """Of class 0 the last row is tied with the first; of class 1 it is tied with the first and the third."""
    scores = np.eye(3)[[0, 1, 2, 0]] * 2
    assert evaluated(scores, [1, 1, 1, 0])["auroc"] == pytest.approx((2 / 3 + 2.5 / 3) / 2)


def test_logarithms_of_probabilities_are_logits():
    scores, labels = drawn(3)
    probabilities = np.array([softmax(row) for row in scores.tolist()])
    found = ClassificationMetrics(3).compute(predictions=np.log(probabilities), references=labels)
    assert found == pytest.approx(evaluated(scores, labels))


def several(seed=0, count=61, labels=4):
    random = np.random.default_rng(seed)
    true = (random.random((count, labels)) < [0.2, 0.5, 0.7, 0.4]).astype("float32")
    return np.round(random.normal(size=true.shape) + true - 0.5, 1), true


@pytest.mark.parametrize("seed", range(2))
def test_several_labels_a_row(seed):
    scores, true = several(seed)
    guessed, positive = 1 / (1 + np.exp(-scores)) >= 0.5, true.astype(bool)
    hits, all_guessed, all_true = (guessed & positive).sum(0), guessed.sum(0), positive.sum(0)
    f1 = 2 * hits / (all_guessed + all_true)
    columns = list(zip(positive.T, scores.T, strict=True))
    expected = {
        "accuracy": np.mean([list(a) == list(b) for a, b in zip(guessed, positive, strict=True)]),
        "f1": f1.mean(),
        "f1_macro": f1.mean(),
        "f1_micro": 2 * hits.sum() / (all_guessed.sum() + all_true.sum()),
        "auroc": np.mean([share_in_order(*column) for column in columns]),
        "average_precision": np.mean([sum_of_steps(*column) for column in columns]),
        **{f"precision_{c}": hits[c] / all_guessed[c] for c in range(4)},
        **{f"recall_{c}": hits[c] / all_true[c] for c in range(4)},
    }
    assert evaluated(scores, true, multi_label=True) == pytest.approx(expected, rel=1e-12)
    metric = ClassificationMetrics(4, multi_label=True)
    assert metric.compute(predictions=scores, references=true.astype(int)) == pytest.approx(expected, rel=1e-12)


def test_a_label_that_no_row_has_is_left_out():
    scores, true = several()
    true[:, 2], true[:, 3] = 0, 1
    found = evaluated(scores, true, multi_label=True)
    two = [share_in_order(true[:, c] == 1, scores[:, c]) for c in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(two))
    three = [sum_of_steps(true[:, c] == 1, scores[:, c]) for c in (0, 1, 3)]
    assert found["average_precision"] == pytest.approx(np.mean(three))
    assert "recall_2" not in found
    assert found["precision_2"] == 0


def test_several_labels_with_nan():
    scores, true = several()
    scores[3, 1] = math.nan
    found = evaluated(scores, true, multi_label=True)
    assert {name for name, value in found.items() if math.isnan(value)} == {"auroc", "average_precision"}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1], r"multi-hot labels \(N, 2\)"),
        ([[0, 2], [0, 1]], "label 2 in row 0"),
        ([[0, 1], [0, 0.5]], "label 0.5 in row 1"),
    ],
)
def test_several_labels_are_0_or_1(labels, says):
    with pytest.raises(ValueError, match=says):
        evaluated(np.zeros((2, 2)), labels, multi_label=True)
