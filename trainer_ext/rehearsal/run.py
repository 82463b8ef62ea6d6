"""Rehearse a launch: train and save, resume and export, verify; the verdict as an object, a table and a file."""

import json
import math
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer_ext.checkpoints.durable import write_durably
from trainer_ext.plain_text import masked, masked_words
from trainer_ext.rehearsal.exported import VERDICT, compare_export, exported_earlier
from trainer_ext.rehearsal.launch import Launch, completed, parse
from trainer_ext.rehearsal.processes import free_port, run_launch, why
from trainer_ext.rehearsal.verify import Check, verify

CHECKPOINTS = "rehearsal"  # inside the output folder, where no later run takes one for its own
CLAIMED = "output_dir"  # in a run's scratch folder: the output folder that its processes name
ALWAYS_MISSED = "speed, GPU memory, GPU kernels and NCCL: gloo and the CPU stood in for them"
MIN_STEPS = 2  # one before the checkpoint, one after it


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found.

    Attributes:
        command: What was rehearsed.
        processes: How many were started.
        checks: What was verified, in order.
        ranks: The records of the first run, one a rank.
        not_covered: What a rehearsal on the CPU cannot show.
        export: The exported files, as `compare_export` found them.
        reason: Why a run ended early, in the words of what raised; None where none did.
        output_dir: The command's own output folder, with the exported weights; None where nothing was trained.
    """

    command: list[str]
    processes: int
    checks: list[Check]
    ranks: list[dict[str, Any]]
    not_covered: list[str]
    export: dict[str, Any] | None = None
    reason: str | None = None
    output_dir: str | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None and all(check.held for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """What `rehearsal.json` holds."""
        first = self.ranks[0] if self.ranks else {}
        packages = ("torch", "transformers", "accelerate", "deepspeed")
        return {
            "command": masked_words(self.command),
            "verdict": "passed" if self.passed else "failed",
            "reason": self.reason and masked(self.reason),
            "checks": [asdict(check) for check in self.checks],
            "processes": self.processes,
            "runs_on": first.get("runs_on"),
            "losses": [loss if math.isfinite(loss) else str(loss) for loss in first.get("losses", [])],
            "peak_memory_bytes": [rank["peak_memory_bytes"] for rank in self.ranks],
            "exported": self.export,
            "not_covered": self.not_covered,
            "versions": {name: version(name) for name in packages},
        }


def rehearse(
    words: list[str],
    *,
    processes: int = 2,
    steps: int = MIN_STEPS,
    resume: bool = True,
    keep_hosts: bool = False,
    timeout: float = 1800,
    log: Path | None = None,
    progress: bool = False,
) -> Rehearsal:
    """Run the launch `words` on CPU processes, and verify what ran.

    Args:
        words: The command, as for GPUs.
        processes: To start on this host; where the hosts are kept, the command says.
        steps: Optimizer steps of the run; its schedule is built for as many.
        resume: Whether a second run resumes from the first one's checkpoint of the step before the last.
        keep_hosts: Whether the command's hosts, rank and address stay, for one rehearsal on each of several hosts.
        timeout: Seconds for each run.
        log: Where the processes' output goes; by default it is kept only to be quoted.
        progress: Whether to say in the terminal which run is under way.

    Returns:
        The verdict. The exported weights are in the command's `output_dir`, beside `rehearsal.json`.

    Raises:
        ValueError: The command cannot be rehearsed, or its output folder holds a run.
    """
    if steps < MIN_STEPS:
        raise ValueError(f"--steps {steps}: at least {MIN_STEPS} are needed, one before the checkpoint and one after.")
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least 1 is needed.")
    launch = parse(words)
    if launch.cpu:
        raise ValueError(
            "--cpu has `accelerate launch` drop DeepSpeed and FSDP: leave it out; a rehearsal is on the CPU."
        )
    launch.require_script()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
        processes = launch.processes if keep_hosts else processes
        stage = Stage(launch, processes, keep_hosts, timeout, Path(scratch), log, progress)
        return _rehearse(stage, words, steps, resume)


def _rehearse(stage: "Stage", words: list[str], steps: int, resume: bool) -> Rehearsal:
    trained, reason = stage.run("train", {"steps": steps, "resume": None, "last": not resume})
    output = trained[0]["output_dir"] if trained else stage.claimed("train")
    resumed = None
    if resume and trained and reason is None:
        checkpoint = Path(trained[0]["output_dir"]) / CHECKPOINTS / f"checkpoint-{steps - 1}"
        if trained[0]["universal"] and stage.has_rank_0(trained):
            reason = stage.make_universal(checkpoint)
        if reason is None:
            resumed, reason = stage.run("resume", {"steps": steps, "resume": str(checkpoint), "last": True})
    last = resumed or trained
    export = compare_export(last[0]) if last and stage.has_rank_0(trained) else None
    asked = completed(stage.launch.asked, trained[0]) if trained else stage.launch.asked
    checks = verify(asked, stage.processes, stage.world_size, steps, trained, resumed, export)
    missed = [ALWAYS_MISSED, *dict.fromkeys(word for rank in trained for word in rank["not_covered"])]
    found = Rehearsal(words, stage.world_size, checks, trained, missed, export, reason, output)
    if output is not None and stage.has_rank_0(trained):
        shutil.rmtree(Path(output) / CHECKPOINTS, ignore_errors=True)
        for stale in exported_earlier(Path(output)) if export is None else []:
            stale.unlink()
        write_durably(Path(output) / VERDICT, json.dumps(found.as_json(), indent=1))
    return found


@dataclass(frozen=True)
class Stage:
    """Where the runs of one rehearsal take place: `processes` of them on this host."""

    launch: Launch
    processes: int
    keep_hosts: bool
    timeout: float
    scratch: Path
    log: Path | None
    progress: bool

    @property
    def world_size(self) -> int:
        return self.processes * self.launch.hosts if self.keep_hosts else self.processes

    def has_rank_0(self, ranks: list[dict[str, Any]]) -> bool:
        """Whether rank 0 ran here, and with it the one write to the shared folder that each thing needs."""
        return not self.keep_hosts or (bool(ranks) and ranks[0]["rank"] == 0)

    def claimed(self, name: str) -> str | None:
        """The output folder that the processes of a run named before they trained, if they made it."""
        path = self.scratch / name / CLAIMED
        folder = path.read_text() if path.is_file() else None
        return folder if folder is not None and Path(folder).is_dir() else None

    def run(self, name: str, plan: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
        """Launch once; the ranks' records, and why it ended early.

        Raises:
            ValueError: The processes found a mistake of the user's.
        """
        folder = self.scratch / name
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({**plan, "folder": str(folder)}))
        words = self.launch.on_this_host(self.processes, free_port(), keep_hosts=self.keep_hosts)
        code, output = self._launched(words, name, folder / "plan.json")
        if (mistake := folder / "mistake.json").is_file():
            raise ValueError(json.loads(mistake.read_text()))
        ranks = sorted((json.loads(path.read_text()) for path in folder.glob("rank*.json")), key=lambda r: r["rank"])
        return ranks, None if code == 0 else why(output, code)

    def make_universal(self, checkpoint: Path) -> str | None:
        """Convert a ZeRO checkpoint for a config that resumes from a universal one; why it failed, or None."""
        tag = (checkpoint / "latest").read_text().strip()
        words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        words += ["--input_folder", str(checkpoint / tag), "--output_folder", str(checkpoint / f"{tag}_universal")]
        code, output = self._launched(words, "universal")
        return None if code == 0 else why(output, code)

    def _launched(self, words: list[str], name: str, plan: Path | None = None) -> tuple[int, str]:
        with Console(stderr=True, quiet=not self.progress).status(f"{name}: {self.processes} processes on the CPU"):
            code, output = run_launch(
                words,
                self.scratch / f"{name}.log",
                processes=self.processes,
                timeout=self.timeout,
                plan=plan,
                environment=self.launch.environment,
            )
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"# {name}: {' '.join(masked_words(words))}\n{masked(output)}\n")
        return code, output
