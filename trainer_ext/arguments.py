"""The toolkit's few knobs beside `TrainingArguments`, checked together."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from trainer_ext.callbacks.time_limit import TimeLimit
from trainer_ext.cores import divide_cores
from trainer_ext.engine import settle_on_cpu
from trainer_ext.heap import keep_freed_memory
from trainer_ext.optim.factory import find_optimizer, optimizer_kwargs
from trainer_ext.optim.rules import parse_rules, rate_findings, read_rules
from trainer_ext.optim.schedules import NAMES, check_schedule

REDUCTIONS = ("weighted_mean", "mean")
SEEDS = ("seed", "data_seed")
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


@dataclass
class CustomTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the loss, and what each parameter's learning rate and decay are.

    One default differs: `logging_nan_inf_filter` is off, so that a loss that is not finite is seen. On a machine
    without an accelerator, several processes train as one run over gloo, as they would on GPUs; FSDP is refused there.

    Raises:
        ValueError: With every finding about the fields below, at once.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace a NaN or infinite loss in the logs by the average of the others, as the stock Trainer "
            "does. Off here: a loss that is not finite is logged as it is."
        },
    )
    lr_scheduler_type: str = (
        field(  # a plain string: the stock annotation lets the command line take its own names only
            default="linear",
            metadata={
                "help": f"The learning rate's course: {', '.join(NAMES)}. Its options go to lr_scheduler_kwargs."
            },
        )
    )
    optim: str = field(
        default=str(TrainingArguments.optim),
        metadata={
            "help": f"The optimizer: one of {', '.join(name.value for name in OptimizerNames)}; `muon`; or "
            "the import path of one, such as torch.optim.NAdam. Its options go to optim_args, as key=value, key=value."
        },
    )
    loss: dict[str, float] | str | None = field(  # in this order for HfArgumentParser
        default=None,
        metadata={
            "help": "The loss: a name in trainer_ext.LOSSES, `model` (the head's own), an import path such as "
            "my_package.losses:dice, or a JSON object from name to weight, a sum of losses "
            '(\'{"cross_entropy": 1, "focal": 0.5}\'). Default: cross_entropy where the model classifies, else model.'
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the loss, as JSON: '{\"label_smoothing\": 0.1}'; of a sum, by its parts' names. Of every "
            "loss with class weights: reweight_after, the share of training after which they count; class_counts, "
            "where the training labels cannot be counted."
        },
    )
    class_weights: list[float] | str | dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "The weight of each class in the loss: `balanced`, `effective_number` or `inverse_sqrt` (from the "
            "training labels), a JSON list with "
            'one number a class ("[1.0, 2.5]"), or a JSON object from label to weight (\'{"1": 2.5}\').'
        },
    )
    loss_reduction: str = field(
        default="weighted_mean",
        metadata={
            "help": "What the weighted sum is divided by: `weighted_mean`, the sum of the weights (as PyTorch), or "
            "`mean`, the number of items."
        },
    )

    sample_weight_column: str | None = field(
        default=None, metadata={"help": "The dataset's column with the weight of each row in the loss."}
    )
    layerwise_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Layer-wise decay of the learning rate: the head learns at the full rate, each layer below at this "
            "factor of the one above, the embeddings slowest. Above 0 to 1; 1 is off. 0.9 is a usual value."
        },
    )
    head_lr_multiplier: float = field(
        default=1.0,
        metadata={
            "help": "The learning rate of the head (what is outside the base model), as a multiple of the run's."
        },
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "What is not trained: `embeddings`, `layers:N` (the first N blocks, without the embeddings), or a "
            "pattern for parameter names such as 'bert.pooler.*'. One that matches nothing is an error."
        },
    )
    param_group_rules: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "Rules for single parameters, a JSON list or the path of a file with one; the first that matches "
            'decides: \'[{"match": "*.classifier.*", "lr_multiplier": 10, "weight_decay": 0}]\'. Conditions: match, '
            "module, ndim, depth, tag. Settings: lr_multiplier, weight_decay. One that matches nothing is an error."
        },
    )
    sort_eval_by_length: bool = field(
        default=False,
        metadata={
            "help": "Evaluate and predict the longest rows first, which saves padding; predictions come in the dataset's "
            "order. Only the rounding of the loss and the logits changes."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Train on while a checkpoint is brought to the disk, hashed and put in its place: the next save, and "
            "the end of training, wait for it. What a save blocks is logged as checkpoint_blocked_seconds."
        },
    )

    max_time: str | None = field(
        default=None,
        metadata={
            "help": "End training in time, with a checkpoint to go on from: '3h50m', '90m' or '1:30:00' from its start; "
            "a minute is left for that checkpoint."
        },
    )

    on_non_finite: str = field(
        default="raise",
        metadata={
            "help": "What a step whose loss or gradient is NaN or infinite does, which changes no weight: 'raise' ends the "
            "run, 'skip' goes on without the step, 'ignore' is the stock class's way, which takes it.",
            "choices": ["raise", "skip", "ignore"],
        },
    )

    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How the model computes attention: a name of transformers, such as sdpa, eager or flash_attention_2, "
            "or `auto`, which is eager on a CPU where attention has dropout. Default: as the model was loaded."
        },
    )

    divide_cores: bool = field(
        default=False,
        metadata={
            "help": "Keep each rank on its own share of the host's cores, with as many threads. OMP_NUM_THREADS and cores "
            "that the launcher has chosen stay as they are."
        },
    )
    keep_freed_memory: bool = field(
        default=False,
        metadata={
            "help": "Keep what a step frees for the next one, in place of giving it back to the system and asking for it "
            "again. Of a CPU's memory, on Linux with glibc; MALLOC_* variables stay as they are."
        },
    )

    def __post_init__(self) -> None:
        settle_on_cpu(self)
        if findings := self._json_findings():
            raise ValueError("; ".join(findings))
        own = {
            name: value
            for name, known in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames))
            if (value := getattr(self, name)) not in set(known)
        }
        for name in own:  # the stock check knows its own names only
            setattr(self, name, type(self).__dataclass_fields__[name].default)
        super().__post_init__()
        if self.divide_cores:
            divide_cores()  # behind accelerate, which sets the threads too
        if self.keep_freed_memory:
            keep_freed_memory()
        for name, value in own.items():
            setattr(self, name, value)
        findings = self._optimizer_findings()
        findings += [
            f"{name}={getattr(self, name)} must be 1 or more" for name in COUNTS if not getattr(self, name) >= 1
        ]
        findings += [
            f"{name}={value} must lie in 0..2**32 - 1"
            for name in SEEDS
            if (value := getattr(self, name)) is not None and not 0 <= value < 2**32
        ]
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            findings.append(f"learning_rate={self.learning_rate} must be a finite number, 0 or more")
        if not (self.max_steps > 0 or self.num_train_epochs >= 0):
            findings.append(f"num_train_epochs={self.num_train_epochs} must be 0 or more where max_steps is not given")
        for name, begins in (("class_weights", ("[", "{")), ("loss", ("{",))):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith(begins):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    findings.append(f"{name}={value!r} is not valid JSON: {error}")
        if self.loss_kwargs is not None and not isinstance(self.loss_kwargs, dict):
            findings.append(f"loss_kwargs={self.loss_kwargs!r} must be a dict, or a JSON object on the command line")
        if self.loss_reduction not in REDUCTIONS:
            findings.append(f"loss_reduction={self.loss_reduction!r} must be one of {', '.join(REDUCTIONS)}")
        if self.loss is not None and not isinstance(self.loss, str | dict):
            findings.append(
                f"loss={self.loss!r} must be a name, an import path or a dict from name to weight; pass a callable to the "
                "trainer"
            )
        findings += self._settle_groups()
        if self.on_non_finite not in ("raise", "skip", "ignore"):
            findings.append(f"on_non_finite={self.on_non_finite!r} must be 'raise', 'skip' or 'ignore'.")
        if self.max_time is not None:
            try:
                TimeLimit(self.max_time)
            except ValueError as error:
                findings.append(str(error))
        if findings:
            raise ValueError("; ".join(findings))

    def set_optimizer(self, name: str = "adamw_torch", *args: Any, **kwargs: Any) -> "CustomTrainingArguments":
        """As in transformers, with `muon` and import paths among the names.

        Raises:
            ValueError: There is no such optimizer, or it has no such argument.
        """
        super().set_optimizer("adamw_torch", *args, **kwargs)
        return self._set(optim=OptimizerNames(name) if name in set(OptimizerNames) else name)

    def set_lr_scheduler(self, name: str = "linear", *args: Any, **kwargs: Any) -> "CustomTrainingArguments":
        """As in transformers, with `one_cycle` among the names.

        Raises:
            ValueError: There is no such schedule, or it does not take `lr_scheduler_kwargs`.
        """
        super().set_lr_scheduler("linear", *args, **kwargs)
        return self._set(lr_scheduler_type=SchedulerType(name) if name in set(SchedulerType) else name)

    def _set(self, **names: Any) -> "CustomTrainingArguments":
        for name, value in names.items():
            setattr(self, name, value)
        if findings := self._optimizer_findings():
            raise ValueError("; ".join(findings))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, as into training_args.bin: everything but tokens."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def _json_findings(self) -> list[str]:
        """What cannot be read among the arguments that are JSON objects, or the paths of files with one."""
        findings = []
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not (isinstance(value, str) and (value.startswith("{") or value.endswith(".json"))):
                continue
            try:
                held = json.loads(value if value.startswith("{") else Path(value).read_text())
            except (OSError, ValueError, RecursionError) as error:
                findings.append(
                    f"{name}={value!r} cannot be read as JSON: {getattr(error, 'strerror', None) or error}"
                )
            else:
                if not isinstance(held, dict):
                    findings.append(f"{name}={value!r} is no JSON object, but {type(held).__name__}")
        return findings

    def _optimizer_findings(self) -> list[str]:
        """What is wrong with the schedule's and the optimizer's names and options, where they are ours."""
        schedule, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        findings = check_schedule(
            str(getattr(schedule, "value", schedule)), options if isinstance(options, dict) else {}
        )
        if not isinstance(self.optim, OptimizerNames):
            try:
                own_optimizer(self)
            except ValueError as error:
                findings.append(str(error))
        return findings

    def _settle_groups(self) -> list[str]:
        """Read what JSON and single words stand for; what is wrong with the knobs of the parameter groups."""
        findings = rate_findings(self.layerwise_lr_decay, self.head_lr_multiplier)
        if isinstance(self.freeze, str):
            self.freeze = [self.freeze]
        patterns = [] if self.freeze is None else self.freeze
        if not (isinstance(patterns, list) and all(isinstance(word, str) and word.strip() for word in patterns)):
            findings.append(f"freeze={self.freeze!r} must be a list of patterns")
        if self.param_group_rules is not None:
            try:
                if isinstance(self.param_group_rules, str):
                    self.param_group_rules = read_rules(self.param_group_rules)
                parse_rules(self.param_group_rules)
            except ValueError as error:
                findings.append(str(error))
        return findings


def own_optimizer(args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class and arguments that `optim` and `optim_args` stand for, where `optim` is no name of transformers.

    Raises:
        ValueError: There is no such optimizer, or it has no such argument.
    """
    cls = find_optimizer(str(args.optim))
    betas = (args.adam_beta1, args.adam_beta2)
    return cls, optimizer_kwargs(cls, args.optim_args, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)


def group_options(args: TrainingArguments) -> dict[str, Any]:
    """What `args` say of the parameter groups, as `trainer_ext.optim.groups.assign` takes it."""
    return {
        "weight_decay": args.weight_decay,
        "layerwise_lr_decay": getattr(args, "layerwise_lr_decay", 1.0),
        "head_lr_multiplier": getattr(args, "head_lr_multiplier", 1.0),
        "rules": parse_rules(getattr(args, "param_group_rules", None) or []),
    }


def asks_for_groups(args: TrainingArguments) -> list[str]:
    """The names of the knobs of the parameter groups that are not at their defaults; the weight decay is none of them."""
    neutral: dict[str, tuple[Any, ...]] = {
        "layerwise_lr_decay": (1.0,),
        "head_lr_multiplier": (1.0,),
        "param_group_rules": (None, []),
    }
    return [name for name, values in neutral.items() if getattr(args, name, values[0]) not in values]
