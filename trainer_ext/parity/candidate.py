"""A mode of several processes: launched as people launch it, recorded by the processes themselves.

    LAUNCHER .. -m trainer_ext.parity.candidate SPEC.json

On a machine without an accelerator the launch is a rehearsal's: real engines, over gloo.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer_ext.rehearsal.processes import free_port, run_launch, why

if TYPE_CHECKING:
    from trainer_ext.parity.modes import Mode

TIMEOUT = 3600.0  # seconds


def launch_candidate(
    mode: "Mode", words: list[str], folder: Path, *, stock: bool, dtype: torch.dtype, progress: bool
) -> None:
    """Train in `mode.ranks` processes, which leave their trajectory in `folder`.

    Raises:
        RuntimeError: The launch failed, in the words of what a process raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "spec.json"
    about = {
        "words": words,
        "folder": str(folder),
        "mode": mode.name,
        "stock": stock,
        "dtype": str(dtype).split(".")[1],
    }
    spec.write_text(json.dumps({**about, "accumulation": mode.accumulation, "ranks": mode.ranks}))
    launch = mode.launch("trainer_ext.parity.candidate", str(spec.resolve()))
    rehearsing = not torch.accelerator.is_available()
    command = launch.on_this_host(mode.ranks, free_port(), rehearsing=rehearsing)
    if progress:
        print(
            f"{mode.name}: {'stock Trainer' if stock else 'CustomTrainer'} in {mode.ranks} processes", file=sys.stderr
        )
    plan = folder / "plan.json"
    plan.write_text("{}")
    code, output = run_launch(
        command, folder / "launch.log", processes=mode.ranks, timeout=TIMEOUT, plan=plan if rehearsing else None
    )
    if code:
        raise RuntimeError(why(output, code))


def main(path: str) -> None:
    """What each process runs."""
    from trainer_ext.engine import blocks_without_embeddings
    from trainer_ext.finetune import build_trainer
    from trainer_ext.parity.matrix import record, stock_trainer
    from trainer_ext.parity.modes import find_mode
    from trainer_ext.task import TaskParser, prepare_task
    from trainer_ext.trainer import CustomTrainer

    spec = json.loads(Path(path).read_text())
    task_arguments, args = TaskParser().parse(spec["words"])
    mode = find_mode(spec["mode"], spec["accumulation"], spec["ranks"])
    batch = args.per_device_train_batch_size * mode.accumulation * mode.ranks
    task = mode.rows(prepare_task(task_arguments), batch, args.max_steps)
    model = task.new_model(args.seed, dtype=getattr(torch, spec["dtype"]), dropout=False)
    trainer_class = stock_trainer(task.class_weights(args.class_weights)) if spec["stock"] else CustomTrainer
    if spec["stock"]:  # which would shard the embeddings of some models twice, and fail before there is a number
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(
            blocks_without_embeddings(model, set(model._no_split_modules))
        )
    trainer = build_trainer(task, args, model=model, trainer_class=trainer_class)
    trajectory = record(trainer, f"{mode.name}: {trainer_class.__name__}" if args.process_index == 0 else None)
    if args.process_index == 0:
        trajectory.save(Path(spec["folder"]))


if __name__ == "__main__":
    main(sys.argv[-1])
