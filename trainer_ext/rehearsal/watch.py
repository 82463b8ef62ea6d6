"""Caps a rehearsed run and records it: what it stood on, what it computed, what it left on disk.

Every rank writes one record, `rank0.json` and so on, into the plan's folder. A mistake of the user's is written
there as `mistake.json` and ends the process.
"""

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainer_ext.engine import count_elements, full_parameters, local_elements, runs_on
from trainer_ext.output_folder import leads_out
from trainer_ext.parity.digests import digest
from trainer_ext.rehearsal import on_cpu
from trainer_ext.rehearsal.exported import exported_earlier
from trainer_ext.rehearsal.run import CHECKPOINTS, CLAIMED

EVALUATED_BATCHES = 2


def watch(plan: dict[str, Any]) -> None:
    """Have every `TrainingArguments` and `Trainer` of this process follow `plan`.

    Args:
        plan: `folder` for the records; `steps`, without which nothing is capped or recorded; `resume`, a checkpoint.
    """
    missed: list[str] = []
    check = TrainingArguments.__post_init__

    def post_init(self: TrainingArguments) -> None:
        missed.extend(on_cpu.adapt(self))
        if "steps" in plan:
            cap(self, plan)
        check(self)
        if "steps" in plan and plan["resume"] is None:
            claim(Path(str(self.output_dir)), Path(plan["folder"]))

    TrainingArguments.__post_init__ = post_init  # type: ignore[method-assign]
    if "steps" in plan:
        _watch_trainers(plan, missed)


def cap(args: TrainingArguments, plan: dict[str, Any]) -> None:
    """A few steps, each logged and saved, and nothing that leaves this machine."""
    capped: dict[str, Any] = {
        "max_steps": plan["steps"],
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
        "save_only_model": False,
        "load_best_model_at_end": False,
        "eval_strategy": "no",
        "resume_from_checkpoint": None,
        "push_to_hub": False,
        "hub_token": None,
        "report_to": "none",
        "disable_tqdm": True,
    }
    for name, value in capped.items():
        setattr(args, name, value)


def claim(folder: Path, records: Path) -> None:
    """Take `folder` for this rehearsal; end the process where it holds a run that is not a rehearsal's, or a link
    through which something would land elsewhere.

    Asked once: later the folder holds what this rehearsal wrote, by this process or by another one.
    """
    claimed = records / CLAIMED
    if claimed.is_file() and claimed.read_text() == str(folder):
        return
    own = [*exported_earlier(folder), folder / "training_args.bin"]
    weights = [path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    found = [path.name for path in [*weights, *folder.glob("checkpoint-*")] if path not in own]
    message = f"output_dir {folder} holds a run ({', '.join(sorted(found)[:3])}); rehearse into a folder of its own."
    if found or (message := leads_out(folder, CHECKPOINTS)):
        (records / "mistake.json").write_text(json.dumps(message))
        sys.exit(2)
    claimed.write_text(str(folder))


def _watch_trainers(plan: dict[str, Any], missed: list[str]) -> None:
    make, train = Trainer.__init__, Trainer.train
    evaluated = Trainer.get_eval_dataloader
    elements: dict[Trainer, int] = {}  # counted before an engine splits them

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        elements[self] = count_elements(cast(nn.Module, self.model))

    def watched_train(self: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        watcher = Watcher(self, plan, missed, elements[self])
        result = train(self, plan["resume"], *args, **kwargs)
        watcher.finish()
        return result

    def eval_dataloader(self: Trainer, eval_dataset: Any = None) -> Any:
        chosen: Any = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        if isinstance(chosen, dict):
            chosen = chosen[eval_dataset] if isinstance(eval_dataset, str) else next(iter(chosen.values()))
        rows = EVALUATED_BATCHES * self.args.per_device_eval_batch_size * self.args.world_size
        if hasattr(chosen, "select"):
            chosen = chosen.select(range(min(rows, len(chosen))))
        return evaluated(self, chosen)

    Trainer.__init__ = init  # type: ignore[method-assign]
    Trainer.train = watched_train  # type: ignore[method-assign]
    Trainer.get_eval_dataloader = eval_dataloader  # type: ignore[method-assign]
    Trainer._get_output_dir = lambda self, trial: str(Path(str(self.args.output_dir)) / CHECKPOINTS)  # type: ignore[method-assign]


class Watcher(TrainerCallback):
    """Watches one `train()` on one rank."""

    def __init__(self, trainer: Trainer, plan: dict[str, Any], missed: list[str], elements: int) -> None:
        self.trainer, self.plan = trainer, plan
        self.record: dict[str, Any] = {
            "trainer": type(trainer).__name__,
            "rank": trainer.args.process_index,
            "output_dir": str(trainer.args.output_dir),
            "deepspeed": trainer.args.deepspeed,
            "fsdp": bool(trainer.args.fsdp),
            "elements": elements,
            "losses": [],
            "grad_norms": [],
            "steps": 0,
            "not_covered": missed,
        }
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = local_sums(cast(nn.Module, self.trainer.model))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.record["losses"].append(float(logs["loss"]))
            if "grad_norm" in logs:  # DeepSpeed without ZeRO does not tell
                self.record["grad_norms"].append(float(logs["grad_norm"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record["steps"] += 1
        found = runs_on(self.trainer, elements=self.record["elements"])
        self.record["runs_on"] = asdict(found)
        self.record["moved"] = local_sums(cast(nn.Module, self.trainer.model)) != self.begun

    def finish(self) -> None:
        """Export, and write the record."""
        trainer, args = self.trainer, self.trainer.args
        engine: Any = trainer.model_wrapped
        folder = Path(str(args.output_dir))
        export = folder if self.plan["last"] else folder / CHECKPOINTS / "export"
        trainer.save_model(str(export))
        self.record |= {
            "exported_to": str(export),
            "architecture": type(trainer.accelerator.unwrap_model(trainer.model)).__name__.removeprefix("FSDP"),
            "weights": {name: digest(tensor) for name, tensor in full_parameters(cast(nn.Module, trainer.model))},
            "universal": bool(getattr(engine, "load_universal_checkpoint", lambda: False)()),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        path = Path(self.plan["folder"]) / f"rank{args.process_index}.json"
        path.with_suffix(".part").write_text(json.dumps(self.record))
        os.replace(path.with_suffix(".part"), path)


def local_sums(model: nn.Module) -> list[float]:
    """One number a parameter, of what this rank holds of it: equal numbers, nothing trained."""
    sums = []
    for parameter in model.parameters():
        part: Any = parameter.detach()
        if hasattr(parameter, "ds_tensor"):
            part = parameter.ds_tensor
        elif local_elements(part) != part.numel():
            part = part.to_local()
        sums.append(torch.sum(part.double() ** 2).item())
    return sums
