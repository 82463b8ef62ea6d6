"""What is known of a run when it ends: read from its arguments, its logs, its model and its optimizer.

What is not known is None or left out; nothing is guessed.
"""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import TrainerState, TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

from trainer_ext.engine import base_optimizer, count_elements, optimizer_groups

ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
FROM_THE_HUB = re.compile(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)@")
TIMES = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")


@dataclass(frozen=True)
class Data:
    """What a data set says of itself; `repository` is the one of the hub that its files came from."""

    name: str | None
    repository: str | None
    split: str | None
    rows: int | None


@dataclass(frozen=True)
class Group:
    """One of the optimizer's parameter groups; `learning_rate` is the one that the schedule multiplies."""

    name: str
    tensors: int
    elements: int
    learning_rate: float
    weight_decay: float | None


@dataclass(frozen=True)
class RunFacts:
    """A run that has ended.

    Attributes:
        about: What was run, in words, by what it is.
        arguments: Training arguments that differ from the defaults.
        numbers: What was measured, by what it is; as it was logged.
        evaluations: Each evaluation's step, epoch and metrics (names begin with `eval_`), without its timings.
        logs: All logs.
        groups: The optimizer's groups.
        model_name: The output folder's name.
        base_model: The model's name on the hub, if it came from there.
        trained_on: The training data.
        evaluated_on: The data of the evaluations, where they were of one set.
        task: The hub's name of what the model's class does.
    """

    about: dict[str, str]
    arguments: dict[str, Any]
    numbers: dict[str, float]
    evaluations: list[dict[str, float]]
    logs: list[dict[str, float]]
    groups: list[Group]
    model_name: str
    base_model: str | None
    trained_on: Data
    evaluated_on: Data | None
    task: str | None


def run_facts(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: Any,
    *,
    trained_on: Data,
    evaluated_on: Data | None,
    began_at: int,
) -> RunFacts:
    """Gather them, on one rank; `began_at` is the optimizer step that the run resumed from, or 0."""
    name = own_class(model).__name__
    classes_of: dict[str, Any] = dict(TASK_MAPPING)
    tasks = [task for task, classes in classes_of.items() if name in classes.values()]
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    about = {
        "model": name,
        "from": source,
        "parameters": f"{count_elements(model):,}, of which {trained:,} are trained",
        "training data": trained_on.name,
        "training rows": None if trained_on.rows is None else f"{trained_on.rows:,}",
        "optimizer": type(base_optimizer(optimizer)).__name__,
        "steps": f"{state.global_step:,} of {state.max_steps:,}",
        "resumed at step": f"{began_at:,}" if began_at else None,
        "engine": engine_of(args, model, optimizer),
        "processes": str(args.world_size),
    }
    return RunFacts(
        about={name: value for name, value in about.items() if value},
        arguments=changed_arguments(args),
        numbers=_numbers(args, state),
        evaluations=evaluations(state.log_history),
        logs=state.log_history,
        groups=_groups(optimizer),
        model_name=Path(str(args.output_dir)).resolve().name,
        base_model=source if source and ON_THE_HUB.fullmatch(source) and not Path(source).exists() else None,
        trained_on=trained_on,
        evaluated_on=evaluated_on,
        task=tasks[0] if len(tasks) == 1 else None,
    )


def data_of(dataset: Any) -> Data:
    """What `dataset` says of itself, if it is one of the package datasets; its rows, if they can be counted."""
    info = getattr(dataset, "info", None)
    files = [FROM_THE_HUB.match(str(url)) for url in getattr(info, "download_checksums", None) or ()]
    found = {match[1] for match in files if match}
    return Data(
        getattr(info, "dataset_name", None),
        found.pop() if len(found) == 1 else None,
        str(dataset.split) if getattr(dataset, "split", None) else None,
        len(dataset) if has_length(dataset) else None,
    )


def engine_of(args: TrainingArguments, model: nn.Module, optimizer: Any) -> str:
    """What the training ran on, by its live objects."""
    if _is_deepspeed(optimizer):
        zero: Any = optimizer.optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            return "DeepSpeed ZeRO-3"
        if hasattr(zero, "single_partition_of_fp32_groups"):
            return f"DeepSpeed ZeRO-{2 if zero.partition_gradients else 1}"
        return "DeepSpeed"
    for kind, engine in ((FSDPModule, "FSDP2"), (FullyShardedDataParallel, "FSDP1")):
        if any(isinstance(module, kind) for module in model.modules()):
            return engine
    if args.world_size > 1:
        return "DDP"
    return "DataParallel" if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1 else "one process"


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults, as the Trainer's own reports show them: tokens are masked."""
    shown, found = args.to_dict(), {}
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name)
        if field.name == "accelerator_config":
            value, default = _given(value), _given(AcceleratorConfig())
        if field.name in shown and value != default and not (_is_nothing(value) and _is_nothing(default)):
            found[field.name] = shown[field.name]
    return found


def evaluations(logs: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """The logs of evaluations; several data sets evaluated at one step are one entry."""
    found: dict[float, dict[str, float]] = {}
    for entry in logs:
        metrics = {
            name: value for name, value in entry.items() if name.startswith("eval_") and _is_metric(name, value)
        }
        if metrics:
            found.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]}).update(metrics)
    return list(found.values())


def own_class(model: nn.Module) -> type:
    """The model's class, below the one that FSDP2 makes of it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def _numbers(args: TrainingArguments, state: TrainerState) -> dict[str, float]:
    """The last logged of each kind; the best metric with its step."""
    last: dict[str, float] = {}
    for entry in state.log_history:
        last.update(entry)
    found: dict[str, float] = {
        name: last[name] for name in ("loss", "train_loss", "train_runtime", "epoch") if name in last
    }
    if state.best_metric is not None:
        found[f"best {args.metric_for_best_model}"] = state.best_metric
    if state.best_global_step is not None:
        found["best step"] = state.best_global_step
    whole: dict[str, float] = next((e for e in reversed(state.log_history) if "train_runtime" in e), {})
    measured = ("samples_per_second", "tokens_per_second", "padding_share", "flops_utilization")
    found |= {name: whole[name] for name in measured if name in whole}
    if "skipped_steps" in last:
        found["skipped_steps"] = last["skipped_steps"]
    return found


def _groups(optimizer: Any) -> list[Group]:
    own: Any = base_optimizer(optimizer).param_groups
    members = optimizer_groups(optimizer, deepspeed=_is_deepspeed(optimizer))
    return [
        Group(
            str(settings.get("name", i)),
            len(parameters),
            sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            float(settings.get("initial_lr", settings["lr"])),
            settings.get("weight_decay"),
        )
        for i, (settings, parameters) in enumerate(zip(own, members, strict=True))
    ]


def _is_metric(name: str, value: Any) -> bool:
    return not name.endswith(TIMES) and isinstance(value, int | float) and not isinstance(value, bool)


def _is_deepspeed(optimizer: Any) -> bool:
    from accelerate.utils import DeepSpeedOptimizerWrapper

    return isinstance(optimizer, DeepSpeedOptimizerWrapper)


def _given(config: AcceleratorConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not _is_nothing(value)}


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or cast(Any, value) in ("", "none", [], {})
