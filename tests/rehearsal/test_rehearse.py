"""Rehearsals of real launches, by the command as a person types it: real processes, real engines, real files."""

import json
import math

import pytest
from transformers import AutoTokenizer, BertForSequenceClassification
from typer.testing import CliRunner

from tests.readme import ROOT, command
from trainer_ext.cli import app
from trainer_ext.rehearsal.exported import file_digest

SCRIPT = "tests/rehearsal/launched.py"
EXAMPLE = ["examples/run_mrpc.py", "--dataset", "sample", "--output_dir"]
FSDP2 = ["accelerate", "launch", "--config_file", "fsdp_configs/fsdp2.yaml"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "400")  # no table breaks its lines


def rehearse(*words, options=()):
    return CliRunner().invoke(app, ["rehearse", "--timeout", "300", *options, "--", *map(str, words)])


def rehearse_script(out, *words, options=("--processes", "1", "--no-resume"), launcher=("python",)):
    return rehearse(*launcher, SCRIPT, "--output_dir", out, "--learning_rate", "1e-3", *words, options=options)


def verdict_in(out):
    return json.loads((out / "rehearsal.json").read_text())


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def passed(found, out, checks):
    """The verdict, after all that holds of every rehearsal that passes."""
    assert found.exit_code == 0, found.output
    assert found.output.rstrip().endswith("passed")
    verdict = verdict_in(out)
    assert (verdict["verdict"], verdict["reason"], verdict["processes"]) == ("passed", None, 2)
    assert {check["name"]: check["held"] for check in verdict["checks"]} == dict.fromkeys(checks, True)
    assert all(check["seen"] for check in verdict["checks"])
    assert len(verdict["losses"]) == 2
    assert all(map(math.isfinite, verdict["losses"]))
    assert len(verdict["peak_memory_bytes"]) == 2
    assert min(verdict["peak_memory_bytes"]) > 50e6
    assert any("NCCL" in missed for missed in verdict["not_covered"])
    assert {"torch", "transformers", "accelerate", "deepspeed"} == verdict["versions"].keys()
    assert verdict["exported"]["wrong"] == []
    assert verdict["exported"]["files"] == {"model.safetensors": file_digest(out / "model.safetensors")}
    assert [path.name for path in out.iterdir() if path.is_dir()] == []
    model, loading = BertForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    encoded = AutoTokenizer.from_pretrained(out)("Shares rose.", "They climbed.", return_tensors="pt")
    assert model(**encoded).logits.isfinite().all()
    return verdict


CHECKS = ["one run", "engine", "optimizer state sharded", "trained", "losses equal on all ranks"]
AFTER = ["checkpoint saved and resumed", "weights exported"]


def test_fsdp2_on_the_example(tmp_path):
    words = [*command("trainer-ext rehearse")[1:], "--dataset", "sample", "--output_dir", str(tmp_path)]
    found = CliRunner().invoke(app, words)
    verdict = passed(found, tmp_path, [*CHECKS, "parameters sharded", *AFTER])
    assert ["rehearse", "--", *verdict["command"]] == words
    on = verdict["runs_on"]
    assert (on["engine"][:4], on["world_size"], on["placements"]) == ("FSDP", 2, ["(Shard(dim=0),)"])
    assert 0.45 < on["local_fraction"] < 0.55
    assert 0.45 < on["optimizer_fraction"] < 0.55


def test_zero3_on_the_example(tmp_path):
    words = ["--deepspeed", "ds_configs/zero3.json"]
    found = rehearse("deepspeed", "--num_gpus", "2", *EXAMPLE, tmp_path, *words)
    on = passed(found, tmp_path, [*CHECKS, "parameters sharded", *AFTER])["runs_on"]
    assert (on["engine"], on["stage"], on["world_size"]) == ("DeepSpeedEngine", 3, 2)
    assert 0.45 < on["local_fraction"] < 0.6  # each rank keeps the small ones whole
    assert 0.45 < on["optimizer_fraction"] < 0.55


def test_a_launch_that_loses_fsdp_fails(tmp_path):
    words = ["--fault", "without_fsdp"]
    found = rehearse_script(tmp_path, *words, launcher=FSDP2, options=["--no-resume"])
    assert found.exit_code == 1, found.output
    assert "asked for fsdp; ran on DistributedDataParallel" in found.output
    assert found.output.rstrip().endswith("failed")
    verdict = verdict_in(tmp_path)
    failed = [check["name"] for check in verdict["checks"] if not check["held"]]
    assert failed == ["engine", "parameters sharded", "optimizer state sharded"]
    assert (verdict["verdict"], verdict["reason"]) == ("failed", None)
    assert verdict["runs_on"]["engine"] == "DistributedDataParallel"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fault", "without_training"], "the script ended without a finished Trainer.train()"),
        (["--learning_rate", "0"], "the weights did not move"),
    ],
)
def test_a_script_that_trains_nothing_fails(tmp_path, words, says):
    found = rehearse_script(tmp_path, *words)
    assert found.exit_code == 1, found.output
    assert says in found.output
    verdict = verdict_in(tmp_path)
    assert verdict["verdict"] == "failed"
    assert [check["name"] for check in verdict["checks"] if not check["held"]] == ["trained"]


def test_a_folder_is_rehearsed_into_again_and_says_what_was_last(tmp_path):
    first = rehearse_script(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    second = rehearse_script(tmp_path, "--learning_rate", "1e-2", options=["--processes", "1", "--steps", "3"])
    for found in (first, second):
        assert found.exit_code == 0, found.output
    assert (tmp_path / "model.safetensors").read_bytes() != weights
    verdict = verdict_in(tmp_path)
    assert len(verdict["losses"]) == 3
    assert verdict["checks"][-2] == {
        "name": "checkpoint saved and resumed",
        "held": True,
        "seen": "step 3 again: loss and gradient norm 0.0e+00 apart",
    }
    broken = rehearse_script(tmp_path, "--fault", "breaks")
    assert broken.exit_code == 1, broken.output
    assert "Ended early: RuntimeError: this script breaks" in broken.output
    verdict = verdict_in(tmp_path)
    assert (verdict["verdict"], verdict["reason"]) == ("failed", "RuntimeError: this script breaks")
    assert verdict["exported"] is None
    assert not (tmp_path / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_folder_with_a_run_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "checkpoint-5/model.safetensors", "trainer_state.json"):
        (tmp_path / name).write_bytes(b"trained for a week")
    before = contents(tmp_path)
    found = rehearse_script(tmp_path)
    assert found.exit_code == 2, found.output
    assert f"output_dir {tmp_path} holds a run (checkpoint-5, model.safetensors)" in found.output
    assert "rehearse into a folder of its own" in found.output
    assert "Traceback" not in found.output
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words", "says"),
    [
        ([], ["srun", "s.py"], "'srun' is no launcher"),
        ([], [], "no command is given"),
        ([], ["python", "examples/run_mrpc.py"], "python starts one process, and 2 are asked for"),
        (["--steps", "1"], ["torchrun", "s.py"], "--steps"),
        ([], ["deepspeed", "s.py", "--deepspeed", "nowhere.json"], "DeepSpeed config nowhere.json"),
        ([], ["torchrun"], "are required: training_script"),
        ([], ["accelerate", "launch", "--cpu", "s.py"], "--cpu has `accelerate launch` drop DeepSpeed and FSDP"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(options, words, says):
    found = rehearse(*words, options=options)
    assert found.exit_code == 2
    assert says in found.output
    assert "Traceback" not in found.output
