"""One process on each of two hosts gives the numbers of one process: the launches of `*_multinode.yaml`.

The hosts are network namespaces, each with a loopback of its own and one network card, joined by a cable.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from tests.distributed.whole_run import LEFT_IN, run
from trainer_ext.engine import REHEARSING
from trainer_ext.rehearsal.launch import PROCESS

ROOT = Path(__file__).parents[2]
CARD = "eth0"
ADDRESSES = ("10.231.77.1", "10.231.77.2")
TRAINER_EXT = str(Path(sys.executable).with_name("trainer-ext"))
PORT = 29500  # a namespace has all ports to itself
# The card has to be named: the host's own name leads gloo to the loopback, which is another one on each host.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": CARD}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("ip") is None, reason="needs iproute2's `ip`"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes network namespaces"),
]


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if "not permitted" in done.stderr or "not supported" in done.stderr:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def hosts():
    """The names of two hosts on one cable."""
    names = [f"trainer-ext-{uuid4().hex[:8]}-{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CARD, "netns", names[0], "type", "veth", "peer", "name", CARD, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CARD, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_both(hosts, command, folder, *, timeout=500, **environment):
    """Run `command(rank)` on each host, to the end of both; what they printed."""
    logs = [folder / f"host{rank}.log" for rank in range(2)]
    running = []
    until = time.monotonic() + timeout
    try:
        for rank, (host, log) in enumerate(zip(hosts, logs, strict=True)):
            with log.open("w") as file:
                words = ["ip", "netns", "exec", host, *command(rank)]
                environ = {**ENVIRONMENT, **environment}
                running.append(subprocess.Popen(words, cwd=ROOT, env=environ, stdout=file, stderr=file))
        # One that fails would leave the other waiting.
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            assert time.monotonic() < until, f"not done after {timeout} s"
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
        for host in hosts:
            end_all(host)
        codes = [process.wait() for process in running]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join([f"exit codes {codes}", *(text[-4000:] for text in said)])
    return said


def end_all(host):
    """End what runs on a host, launched processes in sessions of their own too."""
    while pids := ip("netns", "pids", host).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def launch(config, rank):
    """The words that a person types on one of the hosts, up to the script."""
    words = ["accelerate.commands.launch", "--config_file", f"fsdp_configs/{config}.yaml", "--machine_rank", str(rank)]
    return [sys.executable, "-m", *words, "--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT)]


def sent(host):
    """Bytes that have left a host by its card."""
    return json.loads(ip("-n", host, "-s", "-json", "link", "show", CARD))[0]["stats64"]["tx"]["bytes"]


def apart(one, many):
    """The largest difference between two runs in each quantity, relative to its largest number; NaN where one is."""
    assert one["weights"].keys() == many["weights"].keys()
    differences = {}
    for quantity in ("losses", "grad_norms", "weights"):
        a, b = (torch.tensor(numbers(run[quantity]), dtype=torch.float64) for run in (one, many))
        differences[quantity] = ((a - b).abs().max() / a.abs().max()).item()
    return differences


def numbers(quantity):
    return quantity if isinstance(quantity, list) else [x for name in sorted(quantity) for x in quantity[name]]


@pytest.mark.parametrize(
    ("config", "engine", "dtype", "tolerance"),
    [
        ("ddp_multinode", "DistributedDataParallel", "float64", 1e-11),
        ("fsdp2_multinode", "FSDPBertForSequenceClassification", "float64", 1e-11),
        pytest.param("deepspeed_zero2_multinode", "DeepSpeedEngine", "float32", 1e-5, marks=pytest.mark.soak),
    ],
)
def test_two_hosts_are_one_run(hosts, tmp_path, config, engine, dtype, tolerance):
    out, plan = tmp_path / "out.json", tmp_path / "plan.json"
    plan.write_text("{}")  # a rehearsal that caps and records nothing: the CPU stands in for GPUs, no more
    before = [sent(host) for host in hosts]
    on_both(
        hosts,
        lambda rank: [
            *launch(config, rank), "--module", PROCESS, "-m", "tests.distributed.whole_run", str(out), dtype
        ],
        tmp_path,
        **{REHEARSING: str(plan)},
    )  # fmt: skip
    found = json.loads(out.read_text())
    ranks, alone = found["run"], run(getattr(torch, dtype))[0]

    assert len({rank["host"] for rank in ranks}) == 2
    for rank in ranks:
        assert rank["runs_on"]["engine"] == engine
        assert rank["runs_on"]["world_size"] == 2
        assert rank["runs_on"]["placements"] == (["(Shard(dim=0),)"] if config.startswith("fsdp2") else [])
        assert rank["runs_on"]["stage"] == (2 if config.startswith("deepspeed") else None)
        for quantity, difference in apart(alone, rank).items():
            assert difference < tolerance, quantity
    gradients = 8 * len(alone["losses"]) * sum(map(len, alone["weights"].values()))
    for host, earlier in zip(hosts, before, strict=True):
        assert sent(host) - earlier > gradients / 4

    for rank in found[LEFT_IN]:
        assert min(apart(alone, rank).values()) > 1e-4


def accelerate(rank, config="fsdp2_multinode"):
    _, _, _, *options = launch(config, rank)
    return ["accelerate", "launch", *options]


def universal(rank):
    """Resumes from a checkpoint that is converted once, for both hosts."""
    config = ["--deepspeed_config_file", "ds_configs/zero2_universal.json"]
    return [*accelerate(rank, "deepspeed_zero2_multinode"), *config]


def torchrun(rank):
    """Without a rank on the command line: the hosts settle it when they meet."""
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--local_addr", ADDRESSES[rank]]
    meet += ["--rdzv_conf", f"is_host={1 - rank}"]  # by the hosts' names torchrun would find out itself
    return ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meet]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("command", "ran_on"),
    [(accelerate, "placed (Shard(dim=0),)"), (torchrun, "asked for ddp"), (universal, "ran on DeepSpeedEngine")],
)
def test_a_rehearsal_on_two_hosts(hosts, tmp_path, command, ran_on):
    output = tmp_path / "output"  # a folder that both hosts see, as on a cluster
    script = ["examples/run_mrpc.py", "--dataset", "sample", "--output_dir", str(output)]
    words = [TRAINER_EXT, "rehearse", "--keep-hosts", "--"]
    both = on_both(hosts, lambda rank: [*words, *command(rank), *script], tmp_path, COLUMNS="200")
    for said in both:
        assert "1 process(es) of 1 trained, in a world of 2" in said
        assert ran_on in said
        assert said.rstrip().endswith("passed")
    assert sorted("weights exported" in said for said in both) == [False, True]  # by the host of rank 0
    verdict = json.loads((output / "rehearsal.json").read_text())
    assert verdict["verdict"] == "passed"
    assert verdict["processes"] == 2
    assert list(verdict["exported"]["files"]) == ["model.safetensors"]
    assert not (output / "rehearsal").exists()
