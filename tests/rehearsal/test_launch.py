"""Launch commands as people type them: taken apart, and put together again for this host."""

import json
import shlex
import sys

import pytest

from trainer_ext.rehearsal.launch import PROCESS, Asked, asked_by_config, completed, parse

PORT = 29411
DEEPSPEED = "deepspeed.launcher.runner"
ACCELERATE = "accelerate.commands.launch"
TORCHRUN = "torch.distributed.run"


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """A folder to type commands in, and no accelerate config of this host's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    moved = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme"}}
    held = {
        "zero2": {"zero_optimization": {"stage": 2}},
        "offload": {"zero_optimization": moved},
        "stays": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None}},
        "plain": {"fp16": {"enabled": "auto"}},
        "list": [1],
        "flag": {"zero_optimization": True},
    }
    for name, content in held.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "torn.json").write_text("{")
    common = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: {hosts}\nnum_processes: {n}\n"
    written = {
        "ddp": common.format(hosts=1, n=4) + "distributed_type: MULTI_GPU\n",
        "alone": common.format(hosts=1, n=1) + "distributed_type: 'NO'\n",
        "hosts": common.format(hosts=2, n=8) + "distributed_type: MULTI_GPU\n",
        "fsdp": common.format(hosts=1, n=2) + "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n",
        "fsdp_offload": common.format(hosts=1, n=2)
        + "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_offload_params: true\n",
        "zero3": common.format(hosts=1, n=2)
        + "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n  offload_optimizer_device: cpu\n"
        + "  offload_param_device: none\n",
        "by_file": common.format(hosts=1, n=2)
        + "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: offload.json\n",
    }
    for name, text in written.items():
        (tmp_path / f"{name}.yaml").write_text(text)


def taken_apart(command):
    return parse(shlex.split(command))


@pytest.mark.parametrize(
    ("command", "launcher", "options", "script", "arguments"),
    [
        ("python s.py --a 1", None, "", "s.py", "--a 1"),
        ("python3 s.py", None, "", "s.py", ""),
        ("/usr/bin/python3.11 -m pkg.train -m x", None, "", "-m pkg.train", "-m x"),
        ("deepspeed s.py", DEEPSPEED, "", "s.py", ""),
        ("deepspeed --num_gpus 2 s.py --num_gpus 4", DEEPSPEED, "--num_gpus 2", "s.py", "--num_gpus 4"),
        (
            "venv/bin/deepspeed --include localhost:0,1 --master_port=1 s.py s.py",
            DEEPSPEED, "--include localhost:0,1 --master_port=1", "s.py", "s.py",
        ),
        ("deepspeed --module --num_gpus=2 pkg.train --module", DEEPSPEED, "--num_gpus=2", "-m pkg.train", "--module"),
        ("python -m deepspeed.launcher.runner s.py", DEEPSPEED, "", "s.py", ""),
        ("accelerate launch --config_file ddp.yaml s.py", ACCELERATE, "--config_file ddp.yaml", "s.py", ""),
        (
            "accelerate launch --config_file=ddp.yaml --num_processes 2 s.py --num_processes 8 --config_file other.yaml",
            ACCELERATE, "--config_file=ddp.yaml --num_processes 2", "s.py", "--num_processes 8 --config_file other.yaml",
        ),
        (
            "/opt/bin/accelerate launch -m --config_file ddp.yaml pkg.train -m x --cpu",
            ACCELERATE, "--config_file ddp.yaml", "-m pkg.train", "-m x --cpu",
        ),
        ("accelerate-launch --config_file ddp.yaml s.py", ACCELERATE, "--config_file ddp.yaml", "s.py", ""),
        (
            "python -m accelerate.commands.launch --config_file ddp.yaml s.py",
            ACCELERATE, "--config_file ddp.yaml", "s.py", "",
        ),
        ("accelerate launch s.py --a", ACCELERATE, "", "s.py", "--a"),
        ("accelerate launch --multi_gpu s.py", ACCELERATE, "--multi_gpu", "s.py", ""),
        ("torchrun s.py", TORCHRUN, "", "s.py", ""),
        (
            "torchrun --nproc_per_node 4 s.py --nproc_per_node 8",
            TORCHRUN, "--nproc_per_node 4", "s.py", "--nproc_per_node 8",
        ),
        (
            "torchrun --standalone --nproc-per-node=gpu -m pkg.train",
            TORCHRUN, "--standalone --nproc-per-node=gpu", "-m pkg.train", "",
        ),
        ("python -m torch.distributed.run --nproc_per_node 2 s.py", TORCHRUN, "--nproc_per_node 2", "s.py", ""),
        ("torchrun --nproc_per_node 2 -m pkg.train -- -m", TORCHRUN, "--nproc_per_node 2", "-m pkg.train", "-m"),
        ("torchrun --nproc_per_node 2 -- s.py --a", TORCHRUN, "--nproc_per_node 2", "s.py", "--a"),
    ],
)  # fmt: skip
def test_a_command_is_taken_apart(command, launcher, options, script, arguments):
    found = taken_apart(command)
    assert found.launcher == launcher
    assert found.options == options.split()
    assert found.script == script.split()
    assert found.arguments == arguments.split()
    assert found.environment == {}


def test_variables_before_the_command():
    found = taken_apart("CUDA_VISIBLE_DEVICES=0,1 _X='a b=c' EMPTY= torchrun s.py NAME=value")
    assert found.environment == {"CUDA_VISIBLE_DEVICES": "0,1", "_X": "a b=c", "EMPTY": ""}
    assert (found.launcher, found.script, found.arguments) == (TORCHRUN, ["s.py"], ["NAME=value"])


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python s.py", Asked("single")),
        ("python s.py --deepspeed zero2.json", Asked("deepspeed", 2)),
        ("torchrun s.py", Asked("ddp")),
        ("torchrun s.py --deepspeed=zero2.json", Asked("deepspeed", 2)),
        ("torchrun s.py --note deepspeed --title fsdp --deepspeed_notes x", Asked("ddp")),
        ("torchrun s.py --fsdp", Asked("fsdp")),
        ("torchrun s.py --fsdp 'full_shard auto_wrap' --fsdp_config x.json", Asked("fsdp")),
        ("torchrun s.py --fsdp= --deepspeed=", Asked("ddp")),
        ("torchrun s.py --fsdp-config x.json", Asked("ddp")),
        ("deepspeed s.py", Asked("deepspeed")),
        ("deepspeed s.py --deepspeed zero2.json", Asked("deepspeed", 2)),
        ("deepspeed s.py --deepspeed offload.json", Asked("deepspeed", 3, ("optimizer", "parameters"))),
        ("deepspeed s.py --deepspeed stays.json", Asked("deepspeed", 2)),
        ("deepspeed s.py --deepspeed plain.json", Asked("deepspeed", 0)),
        ("""deepspeed s.py --deepspeed '{"zero_optimization": {"stage": 1}}'""", Asked("deepspeed", 1)),
        ("accelerate launch s.py", Asked("ddp")),
        ("accelerate launch s.py --deepspeed zero2.json", Asked("deepspeed", 2)),
        ("accelerate launch --config_file ddp.yaml s.py", Asked("ddp")),
        ("accelerate launch --config_file alone.yaml s.py", Asked("single")),
        ("accelerate launch --config_file fsdp.yaml s.py", Asked("fsdp")),
        ("accelerate launch --config_file fsdp_offload.yaml s.py", Asked("fsdp", None, ("optimizer", "parameters"))),
        ("accelerate launch --use_fsdp --fsdp_version 2 s.py", Asked("fsdp")),
        ("accelerate launch --config_file zero3.yaml s.py", Asked("deepspeed", 3, ("optimizer",))),
        ("accelerate launch --config_file by_file.yaml s.py", Asked("deepspeed", 3, ("optimizer", "parameters"))),
        ("accelerate launch --use_deepspeed s.py", Asked("deepspeed")),
        ("accelerate launch --use_deepspeed --zero_stage 1 s.py", Asked("deepspeed", 1)),
        ("accelerate launch --use_deepspeed --deepspeed_config_file zero2.json s.py", Asked("deepspeed", 2)),
    ],
)
def test_what_a_command_asks_for(command, asked):
    assert taken_apart(command).asked == asked


@pytest.mark.parametrize(
    ("asked", "record", "expected"),
    [
        (Asked("ddp"), {"deepspeed": "zero2.json"}, Asked("deepspeed", 2)),
        (Asked("single"), {"deepspeed": {"zero_optimization": {"stage": 3}}}, Asked("deepspeed", 3)),
        (Asked("deepspeed"), {"deepspeed": "offload.json"}, Asked("deepspeed", 3, ("optimizer", "parameters"))),
        (Asked("deepspeed", 2), {"deepspeed": "offload.json"}, Asked("deepspeed", 2)),
        (Asked("deepspeed"), {"fsdp": True}, Asked("deepspeed")),
        (Asked("ddp"), {"fsdp": True}, Asked("fsdp")),
        (Asked("ddp"), {}, Asked("ddp")),
        (Asked("fsdp", None, ("optimizer",)), {"fsdp": True}, Asked("fsdp", None, ("optimizer",))),
        (Asked("fsdp"), {"deepspeed": "zero2.json"}, Asked("fsdp")),
    ],
)
def test_what_the_script_asks_for_where_the_command_does_not_say(asked, record, expected):
    assert completed(asked, {"deepspeed": None, "fsdp": False, **record}) == expected


@pytest.mark.parametrize(
    ("command", "hosts", "processes"),
    [
        ("python s.py", 1, 1),
        ("deepspeed --num_gpus 4 s.py", 1, 4),
        ("torchrun --nnodes 2 --node_rank 1 --nproc_per_node 4 s.py", 2, 4),
        ("accelerate launch --config_file ddp.yaml s.py", 1, 4),
        ("accelerate launch --config_file hosts.yaml --machine_rank 1 s.py", 2, 4),
        ("accelerate launch --config_file hosts.yaml --num_processes 4 s.py", 2, 2),
    ],
)
def test_hosts_and_processes(command, hosts, processes):
    found = taken_apart(command)
    assert (found.hosts, found.processes) == (hosts, processes)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("torchrun --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --nproc_per_node 8 s.py --a 1", "s.py --a 1"),
        ("deepspeed --include localhost:0,1 --module pkg.train", "-m pkg.train"),
        ("accelerate launch --config_file hosts.yaml --machine_rank 1 s.py", "s.py"),
    ],
)
def test_the_same_launch_on_this_host(command, words):
    """The launcher's own parser reads what was made of the command: N processes, here, that run the rehearsed script."""
    launch = taken_apart(command)
    python, minus_m, launcher, *made = launch.on_this_host(3, PORT)
    assert [python, minus_m, launcher] == [sys.executable, "-m", launch.launcher]
    if launcher == ACCELERATE:
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(made)
        here = (found.num_processes, found.num_machines, found.machine_rank, found.main_process_ip)
        assert (*here, found.main_process_port, found.config_file) == (3, 1, 0, "127.0.0.1", PORT, "hosts.yaml")
        arguments = found.training_script_args
    elif launcher == TORCHRUN:
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(made)
        here = (found.nproc_per_node, found.nnodes, found.node_rank, found.master_addr, found.master_port)
        assert here == ("3", "1", 0, "127.0.0.1", PORT)
        arguments = found.training_script_args
    else:
        from deepspeed.launcher.runner import parse_args

        found = parse_args(made)
        assert (found.num_gpus, found.master_port, found.include, found.hostfile[:5]) == (3, PORT, "", "/job/")
        arguments = found.user_args
    assert (found.module, found.training_script if launcher != DEEPSPEED else found.user_script) == (True, PROCESS)
    assert arguments == words.split()


def test_one_process():
    assert taken_apart("python s.py --a").on_this_host(1, PORT) == [sys.executable, "-m", PROCESS, "s.py", "--a"]
    for typed in ("accelerate launch --multi_gpu s.py", "accelerate launch s.py"):  # which finds the GPUs itself
        assert "--multi_gpu" in taken_apart(typed).on_this_host(2, PORT)
    assert "--multi_gpu" not in taken_apart("accelerate launch --multi_gpu s.py").on_this_host(1, PORT)


def test_the_script_as_it_is():
    launch = taken_apart("torchrun --nnodes 2 s.py --a")
    assert launch.on_this_host(2, PORT, rehearsing=False)[-2:] == ["s.py", "--a"]
    module = taken_apart("torchrun -m pkg.train --a")
    assert module.on_this_host(2, PORT, rehearsing=False)[-3:] == ["--module", "pkg.train", "--a"]


def test_hosts_that_stay():
    options = "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 7 --nproc_per_node 1"
    found = taken_apart(f"torchrun {options} s.py").on_this_host(1, PORT, keep_hosts=True)
    assert found == [sys.executable, "-m", TORCHRUN, *options.split(), "--module", PROCESS, "s.py"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", ["no command is given", "Put it after `--`"]),
        ("A=1 B=2", ["no command is given", "Put it after `--`"]),
        ("srun s.py", ["'srun' is no launcher", "Begin the command with deepspeed, `accelerate launch`"]),
        ("accelerate test", ["'accelerate' is no launcher", "`accelerate launch`"]),
        ("s.py", ["'s.py' is no launcher", "or python"]),
        ("python", ["'python '", "names no script"]),
        ("python -u s.py", ["'python -u s.py'", "without options of python's own"]),
        ("python -m", ["'python -m'", "give one, or -m MODULE"]),
        ("torchrun --no-python s.sh", ["--no_python", "leave it out"]),
        ("deepspeed --no_python s.sh", ["--no_python", "leave it out"]),
        ("accelerate launch --no_python s.sh", ["--no_python", "leave it out"]),
        ("torchrun", [TORCHRUN, "are required: training_script"]),
        ("accelerate launch --nonsense s.py", [ACCELERATE, "--nonsense s.py", "unrecognized arguments: --nonsense"]),
        ("deepspeed --num_gpus two s.py", [DEEPSPEED, "--num_gpus two s.py", "invalid int value: 'two'"]),
        ("torchrun s.py --deepspeed nowhere.json", ["DeepSpeed config nowhere.json", "No such file"]),
        ("deepspeed s.py --deepspeed torn.json", ["DeepSpeed config torn.json", "Expecting property name"]),
        ("deepspeed s.py --deepspeed list.json", ["DeepSpeed config list.json", "is no JSON object"]),
        (
            "deepspeed s.py --deepspeed flag.json",
            ["DeepSpeed config flag.json", "zero_optimization", "no JSON object"],
        ),
        (
            "accelerate launch --use_deepspeed --deepspeed_config_file nowhere.json s.py",
            ["DeepSpeed config nowhere.json", "No such file"],
        ),
    ],
)
def test_what_is_no_launch(command, says, capsys):
    with pytest.raises(ValueError) as error:
        taken_apart(command)
    for part in says:
        assert part in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_a_config_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        taken_apart("accelerate launch --config_file nowhere.yaml s.py")


def test_python_starts_one_process():
    with pytest.raises(ValueError, match=r"python starts one process, and 2 are asked for.*--processes 1"):
        taken_apart("python s.py").on_this_host(2, PORT)


def test_a_config_as_training_arguments_take_it():
    held = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert asked_by_config(held) == asked_by_config(json.dumps(held)) == Asked("deepspeed", 2, ("optimizer",))
