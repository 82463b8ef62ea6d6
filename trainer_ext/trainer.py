"""`CustomTrainer`: a `Trainer` with an exact loss, our parameter groups and schedule, and overrides that are used."""

from pathlib import Path
from typing import Any, cast

from accelerate.utils import DeepSpeedSchedulerWrapper, DummyOptim
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from trainer_ext.arguments import asks_for_groups, group_options, own_optimizer
from trainer_ext.attention import set_attention
from trainer_ext.callbacks.non_finite_guard import NonFiniteGuard
from trainer_ext.callbacks.stop_on_signal import StopOnSignal
from trainer_ext.callbacks.time_limit import TimeLimit
from trainer_ext.checkpoints.description import save_description
from trainer_ext.checkpoints.trainer import SafeCheckpointsMixin
from trainer_ext.engine import (
    check_engine,
    checkpoint_with_dropout_masks,
    flattens_parameters,
    materialise_new_weights,
    refuse_zenflow,
    saves_shards,
    shard_blocks_without_embeddings,
)
from trainer_ext.gloo_threads import outlast_them
from trainer_ext.lean_evaluation import LeanEvaluationMixin
from trainer_ext.lean_step import LeanStepMixin
from trainer_ext.lost_ranks import lost_ranks, wait_as_long_as_asked
from trainer_ext.optim.factory import brings_own_groups, build_optimizer
from trainer_ext.optim.freezing import freeze
from trainer_ext.optim.groups import assign, groups
from trainer_ext.optim.muon import MuonWithAdamW
from trainer_ext.optim.schedules import build_schedule, group_rates
from trainer_ext.shared_buffers import remove_at_exit

logger = logging.get_logger(__name__)


class CustomTrainer(SafeCheckpointsMixin, LeanEvaluationMixin, LeanStepMixin, Trainer):
    """`Trainer` with an exact loss, weight decay on matrices only, checkpoints that are whole, and an override that is
    really called.

    Takes what `Trainer` takes, with `TrainingArguments` or `CustomTrainingArguments`, and `loss`.
    `optimizers=`, `optimizer_cls_and_kwargs=` and `--optim` are honoured as they are by `Trainer`. A subclass
    may override `create_optimizer_and_scheduler`, which `Trainer.train` itself no longer calls.
    """

    CARRIED = ("_rate", "_group_rates")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is None:
            self._make_ready(cast(nn.Module, self.model))
        if self.optimizer is not None and (asked := asks_for_groups(self.args)):
            raise ValueError(
                f"{', '.join(asked)} would be ignored: an optimizer is passed, with groups of its own. Pass "
                "optimizer_cls_and_kwargs=(class, kwargs) instead."
            )
        self._rate, self._group_rates = 0.0, dict[str, float]()  # of the step that is logged next
        self._stop_on_signal = StopOnSignal()
        max_time = getattr(self.args, "max_time", None)
        ours: list[TrainerCallback] = [self._stop_on_signal, *([TimeLimit(max_time)] if max_time else [])]
        if (action := getattr(self.args, "on_non_finite", "raise")) != "ignore" and self._can_be_guarded():
            ours.append(NonFiniteGuard(action))
        self.callback_handler.callbacks[1:1] = ours  # behind what asks for a save on schedule, before the user's
        if type(self).create_optimizer_and_scheduler is not CustomTrainer.create_optimizer_and_scheduler:
            self._in_combined_override = False
            self._own_create_optimizer = self.create_optimizer
            self.create_optimizer = self._create_by_combined_override  # type: ignore[method-assign]

    def create_accelerator_and_postprocess(self) -> None:
        """The stock set-up; then, that the engine is the one that was asked for, and what FSDP2 needs to be right."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled and self.args.device.type == "cpu":
            remove_at_exit()
        if self.args.world_size > 1:
            outlast_them()
        check_engine(self)
        wait_as_long_as_asked(self)
        refuse_zenflow(self)
        checkpoint_with_dropout_masks(self)
        materialise_new_weights(self)
        shard_blocks_without_embeddings(self)

    def add_callback(self, callback: Any) -> None:
        """The stock method; a `NonFiniteGuard` takes the place of the one that `on_non_finite` has set."""
        if isinstance(callback, NonFiniteGuard) or callback is NonFiniteGuard:
            self.remove_callback(NonFiniteGuard)
        super().add_callback(callback)

    def _can_be_guarded(self) -> bool:
        """Whether `NonFiniteGuard` knows the run, and there is none yet; fp16 leaves out such steps itself."""
        plugin = self.accelerator.state.deepspeed_plugin
        steps_in_backward = plugin is not None and plugin.zero_stage == 0
        there = any(isinstance(callback, NonFiniteGuard) for callback in self.callback_handler.callbacks)
        return not (self.args.fp16 or self.args.n_gpu > 1 or steps_in_backward or there)

    @property
    def stopped_by(self) -> str | None:
        """What ended the last training before its end, with a checkpoint to go on from: a signal's name, `"STOP"` (the
        file) or `"max_time"`; None where it came to its end, or something else stopped it."""
        said = (getattr(callback, "stopped_by", None) for callback in self.callback_handler.callbacks)
        return next(filter(None, said), None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The stock training, which SIGTERM, SIGINT, SIGUSR1 and a file `STOP` end with a checkpoint (`stopped_by`).

        Raises:
            RankLostError: Another rank is dead or hangs.
        """
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if lost := lost_ranks(error, self._stop_on_signal.group):
                raise lost from error
            raise
        finally:
            self._stop_on_signal.put_back()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The stock end; but of a run that was stopped, and will go on, no checkpoint is removed and no best one loaded."""
        best = self.state.best_model_checkpoint
        if self.stopped_by is not None:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, with the attention that is asked for, and what `freeze` names frozen."""
        model = super().call_model_init(trial)
        self._make_ready(model)
        return model

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Build both; override this one to build your own and set `self.optimizer` and `self.lr_scheduler`."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The optimizer over our parameter groups, unless there is one already (`optimizers=`).

        Raises:
            ValueError: The arguments do not fit the model (see `trainer_ext.optim.groups.assign`), or the optimizer brings
                groups of its own.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            groups_by_name = type(self).get_decay_parameter_names is not Trainer.get_decay_parameter_names
            if brings_own_groups(cls, kwargs) or groups_by_name or flattens_parameters(self):
                if asked := asks_for_groups(self.args):
                    why = "get_decay_parameter_names is overridden" if groups_by_name else "FSDP1 flattens parameters"
                    why = f"--optim {self.args.optim} brings its own" if brings_own_groups(cls, kwargs) else why
                    raise ValueError(f"{', '.join(asked)} cannot be used: groups are not the toolkit's ({why}).")
                return super().create_optimizer(model)
            self.optimizer = build_optimizer(model, cls, kwargs, **group_options(self.args))
        elif isinstance(self.optimizer, DummyOptim):  # DeepSpeed builds the one that its config names
            logger.info("The DeepSpeed config's optimizer is built, over our parameter groups; --optim is not used.")
            rows = assign(cast(nn.Module, self.model), **group_options(self.args))
            self.optimizer.params = groups(rows, self.args.learning_rate)
        if isinstance(self.optimizer, MuonWithAdamW) and self.is_deepspeed_enabled:
            raise ValueError(
                "MuonWithAdamW needs whole matrices, and ZeRO flattens them; take DeepSpeed's own Muon (zero2_muon.json, "
                "zero3_muon.json), DDP, FSDP2, or AdamW."
            )
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """What `--optim` names: an entry of transformers' table, `muon`, or an import path."""
        if args.optim not in set(OptimizerNames):
            return own_optimizer(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The schedule that `lr_scheduler_type` names, unless there is one already (`optimizers=`)."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(  # type: ignore[assignment]  # annotated LambdaLR, takes any
                self.args.lr_scheduler_type,
                optimizer or cast(Optimizer, self.optimizer),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                total_steps=num_training_steps,
                options=cast(dict[str, Any] | None, self.args.lr_scheduler_kwargs),
            )
            self._created_lr_scheduler = True
        return cast(LRScheduler, self.lr_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log, with the rate of every group where they differ: `learning_rate` is the first group's."""
        if "learning_rate" in logs:
            logs |= {f"learning_rate_{name}": rate for name, rate in self._group_rates.items()}
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step; and its rates, where DeepSpeed's engine moves them on inside the step."""
        if isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            self._read_rates()
        return super().get_batch_samples(*args, **kwargs)

    def _get_learning_rate(self) -> float:
        """The rate that the step was taken with: read between the optimizer's step and the schedule's."""
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            self._read_rates()
        return self._rate

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The stock norm; those of the parameters go to the guard, which then computes none of its own."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        guard = next((one for one in self.callback_handler.callbacks if isinstance(one, NonFiniteGuard)), None)
        if guard is not None and self.gradient_norms is not None:
            guard.see_norms(self.gradient_norms, model, self.args)
        return norm

    def _read_rates(self) -> None:
        self._rate = super()._get_learning_rate()
        self._group_rates = group_rates(cast(Optimizer, self.optimizer))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock save; and where FSDP keeps its checkpoints sharded, what it leaves out: the configuration and the
        tokenizer of a checkpoint, and whole weights to load after training."""
        super().save_model(output_dir, _internal_call)
        if not self.is_fsdp_enabled or not saves_shards(self):
            return
        if not _internal_call:
            weights = self.accelerator.get_state_dict(self.model)
            self._save(output_dir or self.args.output_dir, state_dict=weights)
        elif self.args.should_save:
            save_description(cast(nn.Module, self.model), self.processing_class, Path(str(output_dir)))

    def _make_ready(self, model: nn.Module) -> None:
        if attention := getattr(self.args, "attn_implementation", None):
            set_attention(model, attention, on_cpu=self.args.device.type == "cpu")
        if patterns := getattr(self.args, "freeze", None):
            logger.info(f"Frozen: {', '.join(freeze(model, patterns))}")
            options = self.args.gradient_checkpointing_kwargs
            if self.args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
                model.enable_input_require_grads()  # type: ignore[operator]  # else frozen inputs end all gradients

    def _create_by_combined_override(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Stands where `Trainer.train` begins to build: a call from there runs the subclass's
        `create_optimizer_and_scheduler`; a call from inside that goes to the class's own `create_optimizer`."""
        if self._in_combined_override:
            return self._own_create_optimizer(*args, **kwargs)
        self._in_combined_override = True
        try:
            self.create_optimizer_and_scheduler(self.state.max_steps)
        finally:
            self._in_combined_override = False
        if self.optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__}.create_optimizer_and_scheduler returned without setting self.optimizer."
            )
        # A scheduler that it built is rebuilt at the next train(), as the Trainer's own is.
        self._created_lr_scheduler = self.lr_scheduler is not None
        return self.optimizer
