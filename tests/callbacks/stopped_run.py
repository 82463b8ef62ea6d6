"""A training that a signal stops, under the engine that the environment asks for; as a script, under any launcher:

python -m tests.callbacks.stopped_run OUT [DEEPSPEED_CONFIG]

goes on from the newest checkpoint in OUT, if there is one, and ends with the exit code of a run that was stopped. Each
rank's process id is in `OUT.pids/RANK`, and the last finished step in `OUT.step`.
"""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, default_data_collator

from tests.callbacks.guard_run import digest
from tests.callbacks.processes import settle_on_cpu
from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.callbacks.stop_on_signal import EXIT_CODE
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.resume import checkpoints_in
from trainer_ext.engine import full_parameters, runs_on
from trainer_ext.rehearsal.processes import free_port

STEPS = 8
ROOT = Path(__file__).parents[2]
RANK = int(os.environ.get("RANK", "0"))


class Sends(TrainerCallback):
    """A real signal to this process, in a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


class Slow(TrainerCallback):
    """Tells each finished step, and rests."""

    def on_step_end(self, args, state, control, **kwargs):
        Path(f"{args.output_dir}.step").write_text(str(state.global_step))
        time.sleep(0.3)


def make(out, *, callbacks=(), **options):
    args = CustomTrainingArguments(
        **{
            "output_dir": str(out), "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": STEPS,
            "logging_steps": 1, "learning_rate": 1e-2, "log_level": "error", "use_cpu": True, "eval_strategy": "steps",
            "eval_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options,
        }
    )  # fmt: skip
    return CustomTrainer(
        model=tiny_model(attn_implementation="eager"),
        args=args,
        train_dataset=rows(26),
        eval_dataset=rows(4),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


def weights(trainer):
    return digest(tensor for _, tensor in full_parameters(trainer.model))


def stop_and_resume(out, number, step, deepspeed=None):
    """A signal to rank 1 alone in a step; the run that it stopped, its continuation, and one that nothing stops."""
    settle_on_cpu(deepspeed)
    rank = int(os.environ["RANK"])
    stopped = make(out, callbacks=[Sends(number, step)] if rank else [], deepspeed=deepspeed)
    stopped.train()
    found = {
        "on": asdict(runs_on(stopped)),
        "stopped": (stopped.stopped_by, stopped.state.global_step),
        "heard": stopped._stop_on_signal._heard,
        "evaluated": [entry["step"] for entry in stopped.state.log_history if "eval_loss" in entry],
        "saved": [(path.name, [str(wrong) for wrong in verify(path)]) for path in checkpoints_in(out)],
    }
    resumed = make(out, deepspeed=deepspeed)
    resumed.train(resume_from_checkpoint=True)
    whole = make(out.with_name("whole"), deepspeed=deepspeed)
    whole.train()
    return found | {
        "ended": (resumed.stopped_by, resumed.state.global_step),
        "weights": [weights(run) for run in (stopped, resumed, whole)],
    }


def torchrun():
    return [
        "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "tests.callbacks.stopped_run",
    ]


def started(tmp_path, *words):
    """A command in a session of its own, once its ranks have taken a step."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
    waited = time.monotonic() + 120
    while not (tmp_path / "run.step").exists() and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.1)
    return process


def main(**options):
    out, config = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    settle_on_cpu(config)
    pids = Path(f"{out}.pids")
    pids.mkdir(exist_ok=True)
    run = make(out, callbacks=[Slow()], deepspeed=config, max_steps=40, ddp_timeout=8, **options)
    (pids / str(RANK)).write_text(str(os.getpid()))
    run.train(resume_from_checkpoint=bool(checkpoints_in(out)))
    sys.exit(EXIT_CODE if run.stopped_by else 0)


if __name__ == "__main__":
    main()
