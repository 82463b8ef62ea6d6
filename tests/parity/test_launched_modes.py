"""Modes of several processes, through the command: real launchers, real engines, held against the plain loop."""

import json
import sys

import pytest
import torch

from tests.readme import command
from trainer_ext.models import TINY, load_model, load_tokenizer
from trainer_ext.parity.modes import find_mode
from trainer_ext.rehearsal.processes import run_launch

COMMAND = [sys.executable, "-c", "from trainer_ext.cli import main; main()", "parity", "run"]


def parity_run(folder, *words):
    """The rows of `parity.json` by mode."""
    sizes = ["--batch-size", "16", "--max-steps", "3", "--warmup_steps", "0", "--output-dir", str(folder / "out")]
    typed = [*COMMAND, "--dataset", "sample", *words, *sizes]
    code, output = run_launch(typed, folder / "log", processes=1, timeout=400)
    path = folder / "out" / "parity.json"
    assert path.is_file(), output[-2000:]
    return code, {row["mode"]: row for row in json.loads(path.read_text())["modes"]}


def test_the_command_of_readme_and_the_factor_of_the_stock_trainer(tmp_path):
    words = command("trainer-ext parity run --dataset sample --modes ddp2")[3:]
    code, rows = parity_run(tmp_path, *words, "--include-stock")
    ours, stock = rows["ddp2_ga2"], rows["stock:ddp2_ga2"]
    assert (code, ours["verdict"], stock["verdict"]) == (0, "equal", "differs")
    on = {"engine": "DistributedDataParallel", "stage": None, "world_size": 2, "local_fraction": 1.0}
    assert ours["runs_on"] == stock["runs_on"] == on
    assert 0 < ours["noise"]["loss"] < 1e-5
    assert stock["loss_ratio"] == pytest.approx(4, rel=1e-3)  # accumulation steps times ranks
    assert stock["gradient_ratio"] == pytest.approx(4, rel=1e-3)
    sharded = rows["fsdp2"]
    assert (sharded["verdict"], sharded["runs_on"]["engine"]) == ("equal", "FSDPBertForSequenceClassification")
    assert 0.45 < sharded["runs_on"]["local_fraction"] < 0.55


@pytest.fixture
def headless(tmp_path):
    """A checkpoint without the classifier's weights, as most are that are fine-tuned."""
    model = load_model(TINY, ["no", "yes"], seed=1, dtype=torch.float32, dropout=True)
    model.base_model.save_pretrained(tmp_path / "headless")
    load_tokenizer(TINY).save_pretrained(tmp_path / "headless")
    return str(tmp_path / "headless")


def test_fsdp2_trains_a_new_head_on_every_rank_in_float64(tmp_path, headless):
    words = ["--modes", "fsdp2", "--model", headless, "--dtype", "float64", "--learning_rate", "1e-3"]
    code, rows = parity_run(tmp_path, *words, "--class-weights", "balanced")
    row = rows["fsdp2"]
    assert (code, row["verdict"]) == (0, "equal"), row
    assert row["runs_on"]["engine"] == "FSDPBertForSequenceClassification"
    assert row["runs_on"]["world_size"] == 2
    assert 0.45 < row["runs_on"]["local_fraction"] < 0.55
    assert row["max_abs_loss_difference"] < 1e-13
    assert row["max_abs_weight_difference"] < 1e-9


def test_zero3_with_rates_by_layer(tmp_path):
    rates = ["--layerwise-lr-decay", "0.5", "--head-lr-multiplier", "4", "--weight-decay", "0.1"]
    code, rows = parity_run(tmp_path, "--modes", "zero3", "--class-weights", "[1, 2.5]", *rates)
    row = rows["zero3"]
    assert (code, row["verdict"]) == (0, "equal"), row
    assert (row["runs_on"]["engine"], row["runs_on"]["stage"]) == ("DeepSpeedEngine", 3)
    assert 0.45 < row["runs_on"]["local_fraction"] < 0.6
    assert row["dropout"] is False


def test_zero_is_not_held_in_float64(call, tmp_path):
    words = ["--dataset", "sample", "--modes", "zero1", "--dtype", "float64", "--output-dir", tmp_path / "out"]
    found = call("parity", "run", *words)
    assert found.exit_code == 2
    assert "ZeRO keeps float32 masters" in " ".join(found.output.split())
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("name", "ranks", "accumulation", "config"),
    [("single", 1, 1, None), ("ga4", 1, 4, None), ("ddp", 3, 1, "ddp"), ("ddp4", 4, 1, "ddp"), ("ddp2_ga2", 2, 2, "ddp"),
     ("zero2", 3, 1, "zero2"), ("zero2_offload", 3, 1, "zero2_offload"), ("fsdp2_ga4", 3, 4, "fsdp2"),
     ("fsdp2_no_reshard", 3, 1, "fsdp2_no_reshard")],
)  # fmt: skip
def test_names(name, ranks, accumulation, config):
    mode = find_mode(name, processes=3)
    assert (mode.ranks, mode.accumulation, mode.config) == (ranks, accumulation, config)
    assert mode.micro_batch(24) == 24 // (ranks * accumulation)


@pytest.mark.parametrize(
    "name", ["ddp1", "ddp0", "zero4", "fsdp2_ga0", "ga2_ga2", "single_ga2", "zero2_", "_ga2", "ddp2ga2"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not known. Choices: single, gaN"):
        find_mode(name)
