"""Launches as they are typed, on a machine without an accelerator: each is the one run that was asked for, or refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.readme import ROOT, command
from trainer_ext.rehearsal.processes import free_port, run_launch

SCRIPT = ["tests/rehearsal/launched.py", "--trainer", "custom"]
AUTO = {
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
DEEPSPEED = ["deepspeed", "--num_gpus", "2"]
TORCHRUN = ["torchrun", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate", "launch", "--config_file"]
RATE = 1e-3

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(launcher, log, *words):
    """The exit code of a launcher of this environment, at a port of its own, and what all its processes printed."""
    accelerate = launcher[0] == "accelerate"
    port, place = ("--main_process_port", 2) if accelerate else ("--master_port", 1)
    typed = [*launcher[:place], port, str(free_port()), *launcher[place:], *map(str, words)]
    return run_launch(typed, log, processes=2, timeout=300)


def script(launcher, out, *words):
    """What both ranks of the small script saw."""
    arguments = ["--output_dir", out, "--max_steps", "2", "--logging_steps", "1", "--learning_rate", RATE]
    arguments += ["--save_strategy", "no", "--per_device_train_batch_size", "4"]
    code, output = launch(launcher, out / "log", *SCRIPT, *arguments, *words)
    assert code == 0, output[-3000:]
    assert sorted(path.name for path in out.glob("seen*")) == ["seen0.json", "seen1.json"]
    return [json.loads((out / f"seen{rank}.json").read_text()) for rank in (0, 1)]


def test_deepspeed_is_one_run_of_two_ranks(tmp_path):
    words = ["--dataset", "sample", "--max_steps", "2", "--save_steps", "2", "--output_dir", tmp_path]
    code, output = launch(command("deepspeed"), tmp_path / "log", *words)
    assert code == 0, output[-3000:]
    saved = tmp_path / "checkpoint-2"
    shards = sorted(path.name for path in (saved / "global_step2").glob("*optim_states.pt"))
    assert shards == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    whole = (saved / "model.safetensors").stat().st_size
    for shard in shards:  # two moments and the float32 masters of half of the model each
        assert (saved / "global_step2" / shard).stat().st_size == pytest.approx(1.5 * whole, rel=0.2)
    assert {path.name for path in saved.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    rows = 2 * 2 * state["train_batch_size"]
    assert state["epoch"] == pytest.approx(rows / 6000, rel=0.01)
    assert {"model.safetensors", "eval_results.json"} <= {path.name for path in tmp_path.iterdir()}


def check_ddp(launcher, out):
    first, second = script(launcher, out)
    assert first["runs_on"]["engine"] == "DistributedDataParallel"
    assert first["runs_on"]["world_size"] == 2
    assert first == second
    losses = [entry["loss"] for entry in first["log"]]
    assert len(losses) == 2
    assert all(0.5 < loss < 0.9 for loss in losses)


def test_ddp_is_one_run_of_two_ranks(tmp_path):
    check_ddp(TORCHRUN, tmp_path)


def test_fsdp_is_refused(tmp_path):
    words = ["--dataset", "sample", "--output_dir", tmp_path / "out"]
    launcher = [*ACCELERATE, "fsdp_configs/fsdp2.yaml"]
    code, output = launch(launcher, tmp_path / "log", "examples/run_mrpc.py", *words)
    assert code != 0
    said = [line for line in output.splitlines() if "trainer-ext rehearse" in line]
    assert len(said) in (1, 2)  # by one rank, or by both
    assert all("FSDP is asked for and there is no accelerator" in line for line in said)
    assert 'run_mrpc.py", line' not in output  # no traceback of the script's; torchrun ends with one of its own
    assert "trainer_ext/" not in output
    assert not (tmp_path / "out").exists()


def test_the_schedule_is_the_one_that_deepspeed_builds(tmp_path):
    """Steps once an optimizer step, not once a micro-batch."""
    own = {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 8, "warmup_type": "linear"}
    config = tmp_path / "scheduler.json"
    scheduler = {"type": "WarmupLR", "params": own}
    config.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 1}, "scheduler": scheduler}))
    words = ["--deepspeed", config, "--gradient_accumulation_steps", "2", "--max_steps", "4", "--warmup_steps", "8"]
    first, second = script(DEEPSPEED, tmp_path, *words)
    assert first == second
    assert (first["runs_on"]["engine"], first["runs_on"]["stage"]) == ("DeepSpeedEngine", 1)
    assert first["schedule"] == "WarmupLR"
    rates = [entry["learning_rate"] for entry in first["log"]]
    taken = [
        step / 8 * RATE for step in (0, 0, 1, 2)
    ]  # by the steps, as DeepSpeed counts: it starts at the minimum twice
    assert rates == pytest.approx(taken)
    moved = max(moved for name, moved in first["moved"].items())
    assert 0.9 * sum(taken) < moved <= 1.01 * sum(taken)
    shared = Path(first["shared_buffer"])  # what DeepSpeed's own launcher has the ranks share is gone when they end
    assert not list(shared.parent.glob(f"{shared.name}*"))
