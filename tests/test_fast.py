"""The fast profile: defaults that an option overrides, for what this machine has, with the same rows and steps."""

import json
import os
import resource
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.conftest import logged, rows
from trainer_ext import CustomTrainingArguments
from trainer_ext.cores import share
from trainer_ext.fast import fast_profile, has_bf16
from trainer_ext.heap import can_keep_freed_memory
from trainer_ext.parity.environment import environment
from trainer_ext.task import TaskParser

ROOT = Path(__file__).parents[1]
CPU = {"use_cpu": True, "report_to": "none"}


@pytest.fixture
def parse(tmp_path):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--dataset", "sample"]
    return lambda *argv: TaskParser(prog="tool").parse([*common, *argv])


@pytest.fixture
def capabilities(monkeypatch):
    return lambda **found: monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)


def test_bf16_is_the_processors_own():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    assert has_bf16(gpu=False) == any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16", "svebf16"))


def test_a_torch_that_cannot_say_what_the_processor_has(monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities")
    assert not fast_profile(**CPU)["bf16"]
    assert environment()["cpu"] == f"unnamed, {torch.backends.cpu.get_cpu_capability()}"


def test_the_profile_is_the_defaults_of_the_command_line(parse, capabilities):
    capabilities(avx512_bf16=True)
    args = parse("--profile", "fast")[1]
    assert (args.bf16, args.train_sampling_strategy, args.divide_cores) == (True, "group_by_length", True)
    assert args.optim == "adamw_torch_fused"
    assert args.learning_rate == parse()[1].learning_rate
    plain = parse()[1]
    assert (plain.bf16, plain.train_sampling_strategy, plain.divide_cores) == (False, "random", False)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("bf16", "false", False),
        ("train_sampling_strategy", "random", "random"),
        ("sort_eval_by_length", "false", False),
        ("optim", "adamw_torch", "adamw_torch"),
        ("attn-implementation", "sdpa", "sdpa"),
        ("divide-cores", "false", False),
    ],
)
def test_each_setting_is_switched_off_by_its_own_option(parse, capabilities, name, value, found):
    capabilities(amx_bf16=True)
    on, off = (parse("--profile", "fast", *words)[1] for words in ([], [f"--{name}", value]))
    name = name.replace("-", "_")
    assert getattr(off, name) == found != getattr(on, name)
    rest = {field for field in fast_profile(**CPU) if getattr(on, field) != getattr(off, field)}
    assert rest == {name}


def test_bf16_is_left_out_where_it_is_emulated(capabilities, caplog):
    capabilities(avx512_f=True, avx2=True)
    assert not fast_profile(**CPU)["bf16"]
    assert "without bf16, which this CPU does not compute natively" in caplog.text
    caplog.clear()
    assert fast_profile(**CPU, bf16=True)["bf16"]
    assert not caplog.text


def test_own_arguments_win(tmp_path):
    args = CustomTrainingArguments(
        str(tmp_path), **fast_profile(**CPU, learning_rate=3e-5, train_sampling_strategy="random")
    )
    assert (args.learning_rate, args.train_sampling_strategy) == (3e-5, "random")


def test_a_profile_that_is_not_there(parse, capfd):
    with pytest.raises(SystemExit) as raised:
        parse("--profile", "quick")
    assert raised.value.code == 2
    assert "invalid choice: 'quick'" in capfd.readouterr().err


def test_every_row_is_trained_once_in_as_many_steps(trainer):
    seen = []

    def collate(batch):
        seen.extend(tuple(row["input_ids"]) for row in batch)
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    data = rows(22)
    for settings in (fast_profile(**CPU), {}):
        seen.clear()
        made = trainer(train=data, data_collator=collate, max_steps=-1, num_train_epochs=1, **settings)
        made.train()
        assert made.state.global_step == 3
        assert sorted(seen) == sorted(map(tuple, data["input_ids"]))


def test_a_loading_process_changes_no_bit(trainer):
    losses = [
        logged(made, "loss")
        for workers in (0, 1)
        if (made := trainer(dataloader_num_workers=workers, **fast_profile(**CPU))).train()
    ]
    assert losses[0] == losses[1] != []


@pytest.mark.parametrize(("cores", "ranks"), [(8, 2), (7, 3), (3, 3)])
def test_every_core_has_one_rank(cores, ranks):
    numbers = [10 + 3 * i for i in range(cores)]
    parts = [share(numbers, rank, ranks) for rank in range(ranks)]
    assert list(chain(*parts)) == numbers
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 <= min(map(len, parts))


ON_CORES = """
import json, os, sys, torch
torch.ones(400, 400) @ torch.ones(400, 400)  # OpenMP's threads are there before
from trainer_ext.cores import divide_cores
if len(sys.argv) > 1:
    os.sched_setaffinity(0, {int(sys.argv[1])})
divide_cores()
masks = {frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}
print(json.dumps([sorted(map(sorted, masks)), torch.get_num_threads()]))
"""


def on_cores(rank, *words, **environment):
    """The masks of all threads, and their number, in a process that is told to be `rank` of 2."""
    told = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    told |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", **environment}
    ran = subprocess.run(
        [sys.executable, "-c", ON_CORES, *words], env=told, capture_output=True, text=True, check=True
    )
    return *json.loads(ran.stdout), ran.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_cores_are_divided():
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    masks, threads, _ = on_cores(0)
    assert (masks, threads) == ([cores[:half]], half)
    masks, threads, _ = on_cores(1, OMP_NUM_THREADS="1")
    assert (masks, threads) == ([cores[half:]], 1)
    assert on_cores(0, LOCAL_WORLD_SIZE="1")[0] == [cores]
    assert on_cores(0, str(cores[-1]))[1] == 1


KEPT = """
import resource, sys, torch
if "kept" in sys.argv:
    from trainer_ext.heap import keep_freed_memory
    keep_freed_memory()

def step():
    held = [torch.ones(2**24) for _ in range(2)]  # of 64 MiB, both freed
    return sum(one[0].item() for one in held)

for _ in range(10):  # until the heap has its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 5 * 2 * 2**26 // resource.getpagesize()  # that five steps need


def faults(*words, **environment):
    """How many pages the kernel gives to a process in five steps that free what they take, and what it logged."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", KEPT, *words]
    ran = subprocess.run(command, env={**told, **environment}, capture_output=True, text=True, check=True)
    return int(ran.stdout), ran.stderr


@pytest.mark.skipif(not can_keep_freed_memory(), reason="needs glibc's malloc, as it is by itself")
def test_freed_memory_is_kept():
    given_back, _ = faults()
    assert given_back > 0.5 * PAGES
    kept, said = faults("kept")
    assert kept < 0.01 * PAGES
    assert said == ""


@pytest.mark.parametrize(
    "told", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_environment_says_of_memory_stays(told):
    given_back, said = faults("kept", **told)
    assert given_back > 0.5 * PAGES
    assert "keep_freed_memory has no effect" in said


def test_an_option_keeps_freed_memory_or_not(monkeypatch):
    told = []
    monkeypatch.setattr("trainer_ext.arguments.keep_freed_memory", lambda: told.append("kept"))
    CustomTrainingArguments("out", **fast_profile(**CPU, keep_freed_memory=True))
    CustomTrainingArguments("out", **fast_profile(**CPU, keep_freed_memory=False))
    CustomTrainingArguments("out", **CPU)
    assert told == ["kept"]
