"""The noise of a machine: measured by reruns that must not matter, and a tolerance that is a multiple of it."""

import json
import math

import pytest

from trainer_ext.parity.calibration import MULTIPLE, Noise, as_json, from_json, tolerance

SIZES = ["--dataset", "sample", "--batch-size", "16", "--max-steps", "3", "--warmup_steps", "0", "--use_cpu"]


@pytest.fixture
def measured(call, tmp_path):
    found = call("parity", "calibrate", *SIZES, "--output-dir", tmp_path)
    assert found.exit_code == 0, found.output
    return found.output, json.loads((tmp_path / "calibration.json").read_text()), tmp_path / "calibration.json"


def test_noise_is_measured_and_a_mode_is_held_to_it(call, tmp_path, measured):
    output, document, path = measured
    ways = [one["way"] for one in document["noise"]]
    assert any("thread" in way for way in ways)
    assert any(way.startswith("adamw_torch") for way in ways)
    assert "rows of each batch reversed" in ways
    assert {"2 micro-batches", "4 micro-batches"} <= set(ways)
    largest = max(max(one["loss"], one["grad_norm"], one["metric"]) for one in document["noise"])
    assert 1e-9 < largest < 1e-4
    assert document["tolerance"]["relative"] == pytest.approx(MULTIPLE * largest)
    assert document["tolerance"]["weights"] == pytest.approx(
        MULTIPLE * max(one["weights"] for one in document["noise"])
    )
    assert "Tolerance, 10 times the largest" in " ".join(output.split())

    words = ["parity", "run", *SIZES, "--modes", "ga2", "--whole-batch", "--include-stock", "--calibration", path]
    found = call(*words, "--output-dir", tmp_path / "run")
    assert found.exit_code == 0, found.output
    rows = {row["mode"]: row for row in json.loads((tmp_path / "run" / "parity.json").read_text())["modes"]}
    assert rows["ga2"]["tolerance"]["name"] == "10 x noise"
    assert rows["ga2"]["tolerance"]["relative"] == document["tolerance"]["relative"]
    assert [rows[name]["verdict"] for name in ("ga2", "stock:ga2")] == ["equal", "differs"]


def test_float64_is_quieter(call, tmp_path):
    call("parity", "calibrate", *SIZES, "--dtype", "float64", "--output-dir", tmp_path)
    document = json.loads((tmp_path / "calibration.json").read_text())
    assert 0 < document["tolerance"]["relative"] < 1e-11


def test_a_tolerance_takes_the_largest_of_each():
    noise = [Noise("a", 1e-7, 2e-6, 0.0, 0.01), Noise("b", 3e-7, 1e-6, 5e-6, 0.02)]
    held = tolerance(noise)
    assert (held.relative, held.weights) == pytest.approx((5e-5, 0.2))
    assert from_json(json.loads(json.dumps(as_json(noise)))) == held
    for place in range(4):
        numbers = [math.nan if i == place else 0.0 for i in range(4)]
        with pytest.raises(ValueError, match="run again with b, came to a number that is not finite"):
            tolerance([Noise("a", 0.0, 0.0, 0.0, 0.0), Noise("b", *numbers)])
    with pytest.raises(ValueError, match="no noise"):
        tolerance([])
    for broken in ({}, {"multiple": 10}, {"multiple": 10, "tolerance": {"relative": 1}}):
        with pytest.raises(ValueError, match="parity calibrate"):
            from_json(broken)


def test_a_calibration_that_cannot_be_read(call, tmp_path):
    found = call("parity", "run", *SIZES, "--calibration", tmp_path / "none.json", "--output-dir", tmp_path / "out")
    assert found.exit_code == 2
    assert "No such file" in found.output
    assert not (tmp_path / "out").exists()


def test_noise_is_measured_in_one_dtype(call, tmp_path):
    found = call("parity", "calibrate", *SIZES, "--dtype", "float32,float64", "--output-dir", tmp_path / "out")
    assert found.exit_code == 2
    assert "noise is measured in one" in " ".join(found.output.split())
    assert not (tmp_path / "out").exists()
