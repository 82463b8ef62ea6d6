"""The pictures of an evaluation hold the names, the counts and the numbers, and are files that can be opened."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from trainer_ext.metrics.pictures import confusion_counts, confusion_matrix, precision_recall, save_pictures
from trainer_ext.metrics.predictions import Predictions

TRUE, PREDICTED = [0] * 11 + [1] * 23 + [2] * 7, [0] * 11 + [1] * 19 + [2] * 4 + [0] * 5 + [2] * 2
NAMES = ["cat & <dog>", "_private", "5$ or 6$"]
SVG = "{http://www.w3.org/2000/svg}"


def predictions(predicted=PREDICTED, true=TRUE, num_labels=3, **options):
    return Predictions.of(np.eye(num_labels)[predicted] * 2, np.array(true), num_labels=num_labels, **options)


def texts(file):
    return [element.text for element in ElementTree.parse(file).iter(f"{SVG}text")]


def title(file):
    return ElementTree.parse(file).find(f"{SVG}title").text


def test_counts_are_by_true_and_predicted_class():
    assert confusion_counts(predictions()).tolist() == [[11, 0, 0], [0, 19, 4], [5, 0, 2]]
    assert confusion_counts(predictions([0, 0], [0, 1], 3)).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_a_confusion_matrix_holds_names_and_counts(tmp_path):
    file = tmp_path / "matrix.svg"
    confusion_matrix(predictions(), NAMES, file)
    found = texts(file)
    assert title(file) == "Confusion matrix: 32 of 41 rows right"
    for name in NAMES:
        assert found.count(name) == 2  # on either axis, as it is written
    assert [text for text in found if text.isdigit()] == ["11", "0", "0", "0", "19", "4", "5", "0", "2"]
    assert {"predicted", "true", "share of the true class"} <= set(found)


def test_precision_over_recall_names_its_classes_with_their_average_precision(tmp_path):
    """Each class has two scores: of the rows predicted as it, and of all others, which are tied."""
    file = tmp_path / "curve.svg"
    precision_recall(predictions(), NAMES, file)
    average = [11 / 16, 19 / 23 + 4 / 23 * 23 / 41, 2 / 7 * 2 / 6 + 5 / 7 * 7 / 41]
    assert {"recall", "precision"} <= set(texts(file))
    assert [text for text in texts(file) if text.startswith("AP ")] == [
        f"AP {value:.3f}: {name}" for value, name in zip(average, NAMES, strict=True)
    ]


def test_two_classes_are_one_curve(tmp_path):
    file = tmp_path / "curve.svg"
    precision_recall(predictions([1, 1, 0, 0], [1, 0, 1, 0], 2), ["no", "yes"], file)
    assert [text for text in texts(file) if "AP" in text] == ["AP 0.500: yes"]
    assert title(file) == "Precision and recall of 4 rows"


def test_the_curve_goes_where_precision_and_recall_are(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **options: drawn.append((list(x), list(y), options)))
    monkeypatch.setattr(Axes, "legend", lambda *args, **options: None)
    scores = np.array([[0, 4.0], [0, 3], [0, 2], [0, 1]])
    precision_recall(Predictions.of(scores, np.array([1, 0, 1, 0]), num_labels=2), ["no", "yes"], tmp_path / "c.svg")
    ((recall, precision, options),) = drawn
    assert list(zip(recall, precision, strict=True)) == [(1, 0.5), (1, 2 / 3), (0.5, 0.5), (0.5, 1), (0, 1)]
    assert options["drawstyle"] == "steps-post"


def test_many_rows_are_a_small_file(tmp_path):
    random = np.random.default_rng(0)
    scores, true = random.normal(size=(60_000, 2)), random.integers(2, size=60_000)
    precision_recall(Predictions.of(scores, true, num_labels=2), ["no", "yes"], tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size < 200_000


def test_many_classes(tmp_path):
    labels = [*range(77)]
    files = save_pictures(predictions(labels, labels, 77), [f"intent {i}" for i in labels], tmp_path)
    assert [file.name for file in files] == ["confusion_matrix.svg", "precision_recall.svg"]
    assert {f"intent {i}" for i in labels} <= set(texts(files[0]))
    assert not any(text.isdigit() for text in texts(files[0]) if text)
    assert sum(text.startswith("AP 1.000") for text in texts(files[1])) == 77


@pytest.mark.parametrize("name", ["等价", "x" * 300, "a\nb", "", "🙂"])
def test_names_of_any_kind(tmp_path, name):
    for file in save_pictures(predictions([0, 1], [0, 1], 2), ["other", name], tmp_path):
        text = " ".join(filter(None, ElementTree.parse(file).getroot().itertext()))
        assert re.search(re.escape(name[:20]).replace("\\\n", r"\s+"), text)
        assert "x" * 25 not in text


def test_without_a_positive_row_there_is_no_curve(tmp_path):
    files = save_pictures(predictions([0, 1], [0, 0], 2), ["no", "yes"], tmp_path)
    assert not [text for text in texts(files[1]) if text.startswith("AP ")]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_scores_that_are_not_numbers_have_no_curve(tmp_path, num_labels):
    scores = np.full((4, num_labels), math.nan)
    made = Predictions.of(scores, np.array([0, 1, 1, 0]), num_labels=num_labels)
    files = save_pictures(made, ["a", "b", "c"][:num_labels], tmp_path)
    assert not [text for text in texts(files[1]) if text.startswith("AP ")]
    assert title(files[0]) == "Confusion matrix: 2 of 4 rows right"


def test_no_rows_at_all(tmp_path):
    files = save_pictures(predictions([0], [-100], 2), ["no", "yes"], tmp_path)
    assert title(files[0]) == "Confusion matrix: 0 of 0 rows right"


def test_several_labels_a_row_have_no_confusion_matrix(tmp_path):
    made = Predictions.of(np.array([[1.0, -1], [1, 1]]), np.array([[1, 0], [0, 1]]), num_labels=2, multi_label=True)
    assert [file.name for file in save_pictures(made, ["a", "b"], tmp_path)] == ["precision_recall.svg"]
    assert [file.name for file in tmp_path.iterdir()] == ["precision_recall.svg"]
    with pytest.raises(ValueError, match="one label a row"):
        confusion_matrix(made, ["a", "b"], tmp_path / "matrix.svg")


def test_the_same_picture_is_the_same_bytes_and_another_format_by_its_ending(tmp_path):
    for file in ("a.svg", "b.svg", "c.png"):
        confusion_matrix(predictions(), NAMES, tmp_path / file)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_process_keeps_its_own_drawing_settings(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    confusion_matrix(predictions(), NAMES, tmp_path / "matrix.svg")
    assert dict(matplotlib.rcParams) == before
