"""How a step's time and memory grow: with the model, the length of the rows, their number in a batch, ranks, and rows.

At each point the stock Trainer, `CustomTrainer` and the stock Trainer once more are processes of their own that take turns,
a step each, so that the machine is the same for all. Models are BERTs with random weights, trained in float32 by AdamW on
one thread a process. All keep the memory that they free (`keep_freed_memory`): what they would give back and take anew
differs from process to process by more than the classes do. Time is from the end of a step to the end of the next; the
first step's is from the call of `train`. Memory is the most that a process held, less what it held after its imports.

    python benchmarks/scaling.py [CURVE ..]

Writes the curves into `benchmarks/results/scaling.json`, beside those that are there.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from pairs import AGAIN, RESULTS, pin_to_one_core, record

from trainer_ext.parity.environment import environment
from trainer_ext.rehearsal.processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.trainer", "trainer_ext.trainer", "datasets"])
ARMS = {"Trainer": "Trainer", "CustomTrainer": "CustomTrainer", "Trainer" + AGAIN: "Trainer"}
SECONDS, ROUNDS = 12.0, (40, 200)  # of a point: how long it goes on, and the fewest and most rounds
RESULT = RESULTS / "scaling.json"

BASE = {"vocabulary": 8192, "hidden": 256, "layers": 3, "batch": 4, "length": 32, "ranks": 1}
SIZES = ((8192, 96, 2), (8192, 256, 3), (30522, 384, 6), (30522, 768, 6), (30522, 768, 12), (30522, 768, 24))
TINY = {"vocabulary": 128, "hidden": 32, "layers": 1, "batch": 16, "length": 8}
ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
CURVES: dict[str, list[dict[str, Any]]] = {
    "parameters": [
        {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "batch": 2, "length": 16}
        for vocabulary, hidden, layers in SIZES
    ],
    "length": [{"length": length} for length in (32, 64, 128, 256, 512)],
    "batch": [{"batch": batch} for batch in (1, 4, 16, 64)],
    "ranks": [{"ranks": ranks} for ranks in (1, 2, 4)],
    "rows streamed": [{**TINY, "rows": rows, "streamed": True} for rows in ROWS],
    "rows shuffled": [{**TINY, "rows": rows, "streamed": False} for rows in ROWS],
}


def bert(point: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=point["vocabulary"],
            hidden_size=point["hidden"],
            num_hidden_layers=point["layers"],
            num_attention_heads=point["hidden"] // 32,
            intermediate_size=4 * point["hidden"],
        )
    )


def rows(point: dict[str, Any], folder: str) -> Any:
    """An Arrow file of `rows` rows that is read as it is needed; without `rows`, as many as a training may use."""
    from datasets import Dataset

    if "rows" in point:
        dataset = Dataset.from_file(str(arrow_file(point["rows"], point["length"], folder)))
        return dataset.to_iterable_dataset() if point["streamed"] else dataset
    ids = list(range(5, 5 + point["length"]))
    return Dataset.from_dict({"input_ids": [ids] * 4096, "labels": [0, 1] * 2048})


def arrow_file(count: int, length: int, folder: str) -> Path:
    import numpy as np
    import pyarrow as pa

    path = Path(folder) / f"{count}.arrow"
    if not path.exists():
        schema = pa.schema({"input_ids": pa.list_(pa.int16()), "labels": pa.int8()})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for start in range(0, count, 10_000):
                size = min(10_000, count - start)
                ids = pa.array(np.arange(size * length, dtype=np.int16) % 100)
                lists = pa.ListArray.from_arrays(np.arange(0, size * length + 1, length, dtype=np.int32), ids)
                labels = pa.array((np.arange(size) % 2).astype(np.int8))
                writer.write_batch(pa.record_batch([lists, labels], schema=schema))
    return path


def train(turns: Connection | None, name: str, point: dict[str, Any], variables: dict[str, str], folder: str) -> None:
    """In a process of its own: train, a step whenever it is told to, and say what that took; ranks but the first follow."""
    os.environ.update(variables)
    from transformers import PrinterCallback, Trainer, TrainerCallback

    from trainer_ext import CustomTrainer, CustomTrainingArguments

    torch.set_num_threads(1)
    if point["ranks"] == 1:
        pin_to_one_core()
    imported = psutil.Process().memory_info().rss
    began = (0.0, 0.0)

    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    class Turns(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal began
            if turns is not None:
                held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
                turns.send({"cpu": now()[0] - began[0], "wall": now()[1] - began[1], "bytes": held})
                turns.recv()
            began = now()

    arguments = CustomTrainingArguments(
        f"{folder}/out", per_device_train_batch_size=point["batch"], max_steps=10_000, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True, log_level="error", dataloader_pin_memory=False, logging_steps=1000,
        keep_freed_memory=True,
    )  # fmt: skip
    made = bert(point)
    if turns is not None:
        turns.send(sum(parameter.numel() for parameter in made.parameters()))
        turns.recv()
    trainer = {"Trainer": Trainer, "CustomTrainer": CustomTrainer}[name](
        made, arguments, train_dataset=rows(point, folder)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns())
    began = now()
    trainer.train()


class Arm:
    """The processes of one training, which go on for a step at a time."""

    def __init__(self, name: str, point: dict[str, Any], folder: str) -> None:
        port = str(free_port())
        self._turns, theirs = CONTEXT.Pipe()
        self._ranks = []
        for rank in range(point["ranks"]):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(point["ranks"])}
            variables |= {"LOCAL_WORLD_SIZE": str(point["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            told = (theirs if rank == 0 else None, name, point, variables if point["ranks"] > 1 else {}, folder)
            self._ranks.append(CONTEXT.Process(target=train, args=told, daemon=True))
            self._ranks[-1].start()
        theirs.close()
        self.parameters = self._turns.recv()

    def step(self) -> dict[str, float]:
        self._turns.send("go on")
        return self._turns.recv()

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()


def measured(point: dict[str, Any], folder: str) -> dict[str, Any]:
    """The point, with seconds, bytes and ratios of a step, and those to the end of the first."""
    if "rows" in point:
        arrow_file(point["rows"], point["length"], folder)
    arms = {name: Arm(cls, point, folder) for name, cls in ARMS.items()}
    try:
        first = [{name: arm.step() for name, arm in arms.items()}]
        for arm in arms.values():
            arm.step()
        steps: list[dict[str, Any]] = []
        start = time.perf_counter()
        while len(steps) < ROUNDS[0] or (time.perf_counter() - start < SECONDS and len(steps) < ROUNDS[1]):
            order = list(arms)[len(steps) % 3 :] + list(arms)[: len(steps) % 3]
            steps.append({name: arms[name].step() for name in order})
    finally:
        for arm in arms.values():
            arm.end()
    parameters = arms["Trainer"].parameters
    kept = {"seconds", "ratios", "rounds", "base"}
    found = {
        part: {key: value for key, value in record(runs, "Trainer", None).items() if key in kept}
        for part, runs in (("first", first), ("step", steps))
    }
    return {**point, "parameters": parameters, **found}


def main() -> None:
    torch.set_num_threads(1)  # as its processes do, and as the record says
    curves = sys.argv[1:] or list(CURVES)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"curves": {}}
    with TemporaryDirectory() as folder:
        for curve in curves:
            points = []
            for changed in CURVES[curve]:
                points.append(measured({**BASE, **changed}, folder))
                last = points[-1]["step"]
                print(curve, changed, last["rounds"], {k: v["median"] for k, v in last["seconds"]["Trainer"].items()},
                      {n: r["cpu"]["median"] for n, r in last["ratios"].items()}, flush=True)  # fmt: skip
            found["curves"][curve] = {"date": date.today().isoformat(), "environment": environment(), "points": points}
            RESULTS.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
