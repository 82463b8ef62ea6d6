"""A mode of several processes: launched as people launch it, recorded by the processes themselves.

    LAUNCHER .. -m trainer_ext.parity.candidate SPEC.json

On a machine without an accelerator the launch is a rehearsal's: real engines, over gloo.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import torch

from trainer_ext.parity.trajectory import LINES
from trainer_ext.plain_text import masked_words
from trainer_ext.rehearsal.processes import free_port, run_launch, why

if TYPE_CHECKING:
    from trainer_ext.parity.modes import Mode

TIMEOUT = 3600.0  # seconds


def launch_candidate(
    mode: "Mode",
    words: list[str],
    folder: Path,
    *,
    stock: bool,
    dtype: torch.dtype,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train in `mode.ranks` processes, which leave their record and each its log (`rank0.log`, ..) in `folder`.

    Raises:
        RuntimeError: The launch failed, in the words of what a process raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.log"), *folder.glob("trajectory.jsonl")]:
        old.unlink()
    spec = folder / "spec.json"
    about = {
        "words": masked_words(words),
        "folder": str(folder.resolve()),
        "mode": mode.name,
        "stock": stock,
        "dtype": str(dtype).split(".")[1],
    }
    spec.write_text(json.dumps({**about, "accumulation": mode.accumulation, "ranks": mode.ranks}))
    launch = mode.launch("trainer_ext.parity.candidate", str(spec.resolve()))
    rehearsing = not torch.accelerator.is_available()
    command = launch.on_this_host(mode.ranks, free_port(), rehearsing=rehearsing)
    plan = folder / "plan.json"
    plan.write_text("{}")
    with following(folder / LINES, on_step):
        code, output = run_launch(
            command, folder / "launch.log", processes=mode.ranks, timeout=TIMEOUT, plan=plan if rehearsing else None
        )
    if code:
        logs = [path.read_text(errors="replace") for path in sorted(folder.glob("rank*.log"))]
        raise RuntimeError(why("\n".join([*logs, output]), code))


@contextmanager
def following(record: Path, on_step: Callable[[], None]) -> Iterator[None]:
    """Call `on_step` for each step that a record gains."""
    done = Event()

    def follow() -> None:
        seen = 0
        while not done.wait(0.5):
            found = record.read_text().count('"kind": "step"') if record.is_file() else 0
            for _ in range(found - seen):
                on_step()
            seen = max(seen, found)

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(path: str) -> None:
    """What each process runs."""
    from trainer_ext.engine import blocks_without_embeddings
    from trainer_ext.finetune import build_trainer
    from trainer_ext.parity.matrix import record, stock_trainer
    from trainer_ext.parity.modes import find_mode
    from trainer_ext.task import TaskParser, prepare_task
    from trainer_ext.trainer import CustomTrainer

    spec = json.loads(Path(path).read_text())
    log = os.open(Path(spec["folder"]) / f"rank{os.environ.get('RANK', '0')}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
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
    record(trainer, Path(spec["folder"]))


if __name__ == "__main__":
    main(sys.argv[-1])
