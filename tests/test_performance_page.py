"""`docs/performance.md` says what the committed records say, and marks what is not to be quoted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "report", module)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_of_the_committed_records(report, tmp_path):
    report.build(ROOT / "benchmarks" / "results", tmp_path)
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()
    drawn, committed = (
        {path.name for path in (folder / "performance").glob("*.svg")} for folder in (tmp_path, ROOT / "docs")
    )
    assert drawn == committed


def comparison(control):
    runs = [{"plain": {"cpu": 0.01}, "ours": {"cpu": 0.03}, "plain, again": {"cpu": 0.01 * control}}] * 3
    from pairs import record

    return record(runs, "plain", {"batch": 4})


@pytest.mark.parametrize(("control", "marks"), [(1.0, 0), (1.019, 0), (1.021, 3), (0.97, 3)])
def test_what_is_not_to_be_quoted_is_marked(report, tmp_path, control, marks):
    (tmp_path / "recording.json").write_text(json.dumps(comparison(control)))
    report.build(tmp_path, tmp_path)
    page = (tmp_path / "performance.md").read_text().partition("\n## ")[2]
    assert page.startswith("Recording")
    assert "| ours | 30 ms (30 ms to 30 ms) | 3.000" in page
    assert page.count("†") == marks  # both ratios, and what the mark means
    assert "## " not in page  # of what has no record nothing is said


def test_a_page_says_once_what_is_the_same_everywhere_and_memory_in_megabytes(report, tmp_path):
    from pairs import record

    first, second = comparison(1.0), record([{"plain": {"MB": 900.4}, "plain, again": {"MB": 900.4}}] * 3, "plain", {})
    for found, cpu in ((first, "one"), (second, "another")):
        found["environment"] = {"date": cpu, "python": "3.11", "cpu": cpu}
    (tmp_path / "recording.json").write_text(json.dumps(first))
    (tmp_path / "overhead.json").write_text(json.dumps(second))
    report.build(tmp_path, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "The same for all: python 3.11. " in page
    assert page.count("python 3.11") == 1
    assert "3 rounds: batch 4; cpu one.\n" in page
    assert "3 rounds: cpu another.\n" in page
    assert "| plain | 900 (900 to 900) | 1 |" in page


def test_what_arms_found_and_how_accurate_they_are(report, tmp_path):
    found = {"plain": {"loss": 0.25, "f1": 1 / 3}, "ours": {"loss": 0.5, "f1": 2 / 3}}
    (tmp_path / "evaluation_here.json").write_text(json.dumps({**comparison(1.0), "found": found}))
    arms = {"stock": (0.8, 0.82, 0.84), "chosen": (0.9, 0.9, 0.9)}
    runs = [
        {"arm": arm, "seed": seed, "accuracy": value, "f1": value, "train_cpu_seconds": 60.0 * value}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    from accuracy import record

    (tmp_path / "accuracy.json").write_text(json.dumps(record(runs)))
    report.build(tmp_path, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| ours | 0.5 | 0.666667 |" in page
    assert "| stock | 3 | 0.8200 ± 0.0200 | 0.8200 ± 0.0200 |" in page
    assert "| chosen | 3 | 0.9000 ± 0.0000 |" in page


def test_growth_is_that_of_a_power(report):
    from curves import exponent

    xs = [1e3, 1e5, 1e6]
    assert abs(exponent(xs, [7 * x**1.5 for x in xs]) - 1.5) <= 1e-9
    assert not abs(exponent(xs, [7 * x for x in xs]) - 1.5) <= 0.4
