"""From the command that a person types to the same launch on this host's CPU: pure functions over words.

The real launchers stay in place (`deepspeed`, `accelerate launch`, `torchrun`), with their real parsers deciding where
the script begins. Only how many processes they start, where, and what those run is changed:

    accelerate launch --config_file X.yaml script.py --a 1
    accelerate launch --config_file X.yaml --num_processes 2 .. --module trainer_ext.rehearsal.process script.py --a 1
"""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROCESS = "trainer_ext.rehearsal.process"
# The words by which a launcher is called, and the module that it is.
LAUNCHERS = {
    ("deepspeed",): "deepspeed.launcher.runner",
    ("accelerate", "launch"): "accelerate.commands.launch",
    ("accelerate-launch",): "accelerate.commands.launch",
    ("torchrun",): "torch.distributed.run",
}
STAGES = (0, 1, 2, 3)
# The parts of the state that DeepSpeed can move, and the keys that say where.
OFFLOADED = {"optimizer": "offload_optimizer", "parameters": "offload_param"}


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    Attributes:
        engine: `deepspeed`, `fsdp`, `ddp` or `single`.
        stage: The ZeRO stage.
        offload: The parts of the state to be moved, `optimizer` or `parameters`.
    """

    engine: str
    stage: int | None = None
    offload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A command taken apart.

    Attributes:
        launcher: The launcher's module, or None for plain `python`.
        options: The launcher's options.
        script: The script's path, or `-m` and its module.
        arguments: The script's.
        environment: What stood before the command as `NAME=value`.
        asked: What the command asks for.
        hosts: How many hosts the launch spans.
        processes: How many the command starts on one host, where it says so.
        cpu: Whether accelerate is told to use the CPU, and drops DeepSpeed and FSDP.
        finds_gpus: Whether accelerate is left to find out that there are several GPUs.
    """

    launcher: str | None
    options: list[str]
    script: list[str]
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    asked: Asked = field(default_factory=lambda: Asked("single"))
    hosts: int = 1
    processes: int = 1
    cpu: bool = False
    finds_gpus: bool = False

    def require_script(self) -> None:
        """Raise where the script is not there: launchers say so after half a minute, and several times.

        Raises:
            ValueError: With its path.
        """
        if self.script[0] != "-m" and not Path(self.script[0]).exists():
            raise ValueError(f"there is no script {self.script[0]!r} in {Path.cwd()}.")

    def on_this_host(
        self, processes: int, port: int, *, keep_hosts: bool = False, rehearsing: bool = True
    ) -> list[str]:
        """The words that start `processes` processes here.

        Args:
            processes: Of this host.
            port: A free one, for the processes to meet at.
            keep_hosts: Whether the command's hosts, rank and address stay: this is one host's part of the launch.
            rehearsing: Whether the script is run as in a rehearsal, or as it is.

        Raises:
            ValueError: The launcher cannot start so many, or cannot start this host's alone.
        """
        inner = ["-m", PROCESS, *self.script, *self.arguments] if rehearsing else [*self.script, *self.arguments]
        if self.launcher is None:
            if processes > 1:
                raise ValueError(
                    f"python starts one process, and {processes} are asked for: begin the command with torchrun, "
                    "`accelerate launch` or deepspeed, or pass --processes 1."
                )
            return [sys.executable, *inner]
        if keep_hosts and self.launcher == "deepspeed.launcher.runner":
            raise ValueError(
                "--keep-hosts rehearses one host's part, and deepspeed starts every host from one, by ssh. Begin the "
                "command with `accelerate launch` or torchrun, on each host."
            )
        options = [*self.options, "--multi_gpu"] if self.finds_gpus else self.options
        options = options if keep_hosts else HOST_OPTIONS[self.launcher](options, processes, port)
        module = ["--module", *inner[1:]] if inner[0] == "-m" else inner
        return [sys.executable, "-m", self.launcher, *options, *module]


def parse(words: list[str]) -> Launch:
    """Take a launch command apart.

    Raises:
        ValueError: It is none, or one that starts no Python script; the message says why.
    """
    environment = {}
    while words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
        environment[match[1]] = match[2]
        words = words[1:]
    if not words:
        raise ValueError("no command is given. Put it after `--`, as in `-- torchrun script.py ...`.")
    name, rest = Path(words[0]).name, words[1:]
    if re.fullmatch(r"python[\d.]*", name):
        return _parse_python(rest, environment)
    for called, launcher in LAUNCHERS.items():
        if [name, *rest][: len(called)] == list(called):
            return _parse_launcher(launcher, rest[len(called) - 1 :], environment)
    raise ValueError(
        f"{words[0]!r} is no launcher that is known. Begin the command with deepspeed, `accelerate launch`, "
        "torchrun or python."
    )


def _parse_python(words: list[str], environment: dict[str, str]) -> Launch:
    if words[:1] == ["-m"] and words[1:2] and words[1] in LAUNCHERS.values():
        return _parse_launcher(words[1], words[2:], environment)
    width = 2 if words[:1] == ["-m"] else 1
    if len(words) < width or (width == 1 and words[0].startswith("-")):
        raise ValueError(
            f"'python {' '.join(words)}' names no script: give one, or -m MODULE, without options of python's own."
        )
    asked = asked_by_script(words[width:], engine="single")
    return Launch(None, [], words[:width], words[width:], environment, asked)


def _parse_launcher(launcher: str, words: list[str], environment: dict[str, str]) -> Launch:
    found, arguments = _parsed(launcher, words)
    if getattr(found, "no_python", False):
        raise ValueError("--no_python starts any program: leave it out, and name the Python script.")
    end = len(words) - len(arguments) - 1
    end -= words[end] == "--"  # which the launcher's parser takes away
    options = [word for word in words[:end] if word not in ("--module", "-m", "--")]
    script = ["-m", words[end]] if found.module else [words[end]]
    hosts, processes = _hosts(launcher, found)
    asked = _asked(launcher, found, arguments)
    cpu, finds_gpus = (bool(getattr(found, name, False)) for name in ("cpu", "finds_gpus"))
    return Launch(launcher, options, script, arguments, environment, asked, hosts, processes, cpu, finds_gpus)


def _hosts(launcher: str, found: Any) -> tuple[int, int]:
    """Hosts, and the processes of each.

    Raises:
        ValueError: The launcher's config says something else than numbers.
    """
    if launcher == "accelerate.commands.launch":
        hosts, processes = found.num_machines or 1, found.num_processes or 1
        if not (isinstance(hosts, int) and isinstance(processes, int) and hosts > 0):
            raise ValueError(
                f"num_machines={hosts!r} and num_processes={processes!r} must be whole numbers, at least 1."
            )
        return hosts, max(1, processes // hosts)
    if launcher == "torch.distributed.run" and str(found.nnodes).isdigit() and str(found.nproc_per_node).isdigit():
        return int(found.nnodes), int(found.nproc_per_node)
    return 1, max(1, int(getattr(found, "num_gpus", 1)))


def _parsed(launcher: str, words: list[str]) -> tuple[Any, list[str]]:
    """The launcher's own reading of the words, and those that it leaves to the script.

    Raises:
        ValueError: The launcher does not take them.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return _read(launcher, words)
    except SystemExit:
        complaint = said.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(f"{launcher} does not take {' '.join(words)!r}: {complaint}") from None
    except (yaml.YAMLError, TypeError, AttributeError, KeyError, RecursionError) as error:  # of a config file
        reason = "it holds no settings by name" if isinstance(error, TypeError | AttributeError) else error
        raise ValueError(f"{launcher} cannot read the config of {' '.join(words)!r}: {reason}.") from error


def _read(launcher: str, words: list[str]) -> tuple[Any, list[str]]:
    if launcher == "deepspeed.launcher.runner":
        from deepspeed.launcher.runner import parse_args

        found = parse_args(words)
        return found, found.user_args
    if launcher == "accelerate.commands.launch":
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        found, config, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        if config is None and not (found.use_deepspeed or found.use_fsdp):
            found.finds_gpus = not found.multi_gpu
            found.multi_gpu = True  # which accelerate takes for granted where there are several GPUs
        return found, found.training_script_args
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(words)
    return found, found.training_script_args


def _asked(launcher: str, found: Any, arguments: list[str]) -> Asked:
    if launcher == "deepspeed.launcher.runner":
        return asked_by_script(arguments, engine="deepspeed")
    if launcher == "accelerate.commands.launch":
        if found.use_deepspeed:
            if found.deepspeed_config_file is not None:
                return asked_by_config(found.deepspeed_config_file)
            devices = {"optimizer": found.offload_optimizer_device, "parameters": found.offload_param_device}
            return Asked("deepspeed", found.zero_stage, _moved(devices))
        if found.use_fsdp:
            offload = str(found.fsdp_offload_params).lower() == "true"
            return Asked("fsdp", offload=("optimizer", "parameters") if offload else ())
        return asked_by_script(arguments, engine="ddp" if found.multi_gpu else "single")
    return asked_by_script(arguments, engine="ddp")


def asked_by_script(arguments: list[str], *, engine: str) -> Asked:
    """What the script's arguments ask for beside the launcher, by the names of `TrainingArguments`."""
    values = {}
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        following = arguments[place + 1] if place + 1 < len(arguments) else "true"
        if name.startswith("--"):
            values[name[2:].replace("-", "_")] = value if equals else following
    if values.get("deepspeed"):
        return asked_by_config(values["deepspeed"])
    return Asked("fsdp") if values.get("fsdp") else Asked(engine)


def asked_by_config(config: str | dict[str, Any]) -> Asked:
    """What a DeepSpeed config asks for.

    Args:
        config: A path, JSON, or what JSON holds, as `TrainingArguments` takes it.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if isinstance(config, str):
            text = config if config.lstrip().startswith("{") else Path(config).read_text()
        held = json.loads(text) if isinstance(config, str) else config
        zero = held.get("zero_optimization", {})
        devices = {part: (zero.get(key) or {}).get("device") for part, key in OFFLOADED.items()}
        stage = zero.get("stage", 0)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"DeepSpeed config {config}: {error}") from None
    except AttributeError:
        raise ValueError(f"DeepSpeed config {config}: it, or its zero_optimization, is no JSON object.") from None
    if stage not in STAGES:
        raise ValueError(
            f"DeepSpeed config {config}: zero_optimization.stage is {stage!r}; choose one of {', '.join(map(str, STAGES))}."
        )
    return Asked("deepspeed", stage, _moved(devices))


def completed(asked: Asked, record: dict[str, Any]) -> Asked:
    """`asked`, with what the command left to the script's own arguments, as a rank recorded them."""
    if asked.engine == "fsdp" or asked.stage is not None:
        return asked
    if record["deepspeed"]:
        return asked_by_config(record["deepspeed"])
    return Asked("fsdp") if record["fsdp"] and asked.engine != "deepspeed" else asked


def _moved(devices: dict[str, str | None]) -> tuple[str, ...]:
    return tuple(part for part, device in devices.items() if device not in (None, "none"))


def _deepspeed_options(options: list[str], processes: int, port: int) -> list[str]:
    """DeepSpeed's other options choose hosts and devices: none of them is left."""
    return ["--num_gpus", str(processes), "--master_port", str(port)]


def _accelerate_options(options: list[str], processes: int, port: int) -> list[str]:
    here = ["--num_machines", "1", "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--gpu_ids", "all"]
    if processes == 1:  # for which accelerate refuses the word
        options = [word for word in options if word != "--multi_gpu"]
    return [*options, "--num_processes", str(processes), "--main_process_port", str(port), *here]


def _torchrun_options(options: list[str], processes: int, port: int) -> list[str]:
    here = ["--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1", "--rdzv_backend", "static"]
    return [*here, "--master_port", str(port), "--nproc_per_node", str(processes)]


HOST_OPTIONS = {
    "deepspeed.launcher.runner": _deepspeed_options,
    "accelerate.commands.launch": _accelerate_options,
    "torch.distributed.run": _torchrun_options,
}
