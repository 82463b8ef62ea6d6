"""`ElasticResumeMixin`: a run goes on from a checkpoint of another engine, or of another number of processes.

Where the engine reads the checkpoint by itself, it does. Else the stock class prepares the model and the optimizer without
a checkpoint, and the weights, the optimizer's state, its options and the schedule are put into them by name. Either way the
samples are held to be those that were not trained yet.
"""

import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.utils import logging

from trainer_ext.checkpoints.into_engine import put_moments, put_weights
from trainer_ext.checkpoints.moments import open_moments
from trainer_ext.checkpoints.run_record import (
    RunRecord,
    gaps_between,
    read_record,
    record_of,
    require_same_data,
    set_options,
)
from trainer_ext.checkpoints.trusted import load
from trainer_ext.checkpoints.weights import open_weights
from trainer_ext.engine import base_optimizer, is_deepspeed

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class ElasticResumeMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it has that class go on from checkpoints of other engines.

    The samples of a step have to be as many as they were: per_device_train_batch_size x gradient_accumulation_steps x
    processes.
    """

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The stock preparation; what it cannot read of a checkpoint, it is not shown.

        Raises:
            ValueError: The checkpoint's data, model or optimizer is not this run's; with what differs, and what to do.
        """
        saved = read_record(Path(resume_from_checkpoint)) if resume_from_checkpoint is not None else None
        if saved is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        folder, now = Path(resume_from_checkpoint), record_of(self, train_dataloader)
        if not self.args.ignore_data_skip:
            require_same_data(saved, now, folder)
        if now.same_files(saved):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        _require_convertible(saved, now, folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._put_into_engine(folder, saved, record_of(self, train_dataloader))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The stock method, where it knows the files; else the weights come once the engine is there."""
        saved = read_record(Path(resume_from_checkpoint))
        if saved is None or record_of(self, None).same_files(saved):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The stock method; of a best checkpoint that was saved on another engine, its weights."""
        best = Path(str(self.state.best_model_checkpoint))
        saved = read_record(best)
        if saved is None or record_of(self, None).same_files(saved):
            super()._load_best_model()
        else:
            put_weights(cast(nn.Module, self.model), self.optimizer, open_weights(best)[1])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The stock method; on another number of processes each takes up the state of one that was."""
        saved = read_record(Path(checkpoint)) if checkpoint is not None else None
        if saved is None or saved.world_size == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        rank = self.args.process_index
        logger.warning(
            f"The checkpoint is of {saved.world_size} process(es) and this run of {self.args.world_size}: process {rank} "
            f"goes on with the random state of process {rank % saved.world_size}, so that dropout draws other masks than "
            "the run would have without the change."
        )
        with TemporaryDirectory() as folder:
            there = Path(str(checkpoint), _random_state(rank % saved.world_size, saved.world_size))
            shutil.copyfile(there, Path(folder, _random_state(rank, self.args.world_size)))
            super()._load_rng_state(folder)

    def _put_into_engine(self, folder: Path, saved: RunRecord, now: RunRecord) -> None:
        if gaps := gaps_between(saved, now):
            more = f"; and {len(gaps) - 5} more" if len(gaps) > 5 else ""
            raise ValueError(
                f"{folder} was saved by {saved}, and this run is {now}. Its optimizer's state cannot be taken over: "
                f"{'; '.join(gaps[:5])}{more}. Set what differs as it was, or go on with {saved.layout} on "
                f"{saved.world_size}."
            )
        logger.info(
            f"{folder} was saved by {saved}, and goes on as {now}: weights and moments are taken over by name."
        )
        model = cast(nn.Module, self.model)
        put_weights(model, self.optimizer, open_weights(folder)[1])
        put_moments(model, self.optimizer, open_moments(folder, saved.names))
        set_options(base_optimizer(self.optimizer).param_groups, saved)
        self._put_schedule(folder)
        engine: Any = self.model_wrapped
        if is_deepspeed(engine):
            engine.global_steps = self.state.global_step
            engine.global_samples = self.state.global_step * engine.train_batch_size()
        else:
            self._load_scaler(str(folder))

    def _put_schedule(self, folder: Path) -> None:
        """The schedule goes on from its step: transformers saves its own beside the engine's files, DeepSpeed in them."""
        if (folder / "scheduler.pt").is_file():
            state = load(folder / "scheduler.pt")
        else:
            tag = folder / (folder / "latest").read_text().strip()
            state = load(min(tag.glob("*_model_states.pt")))["lr_scheduler"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer is to be saved with it, as it is
            cast(Any, self.lr_scheduler).load_state_dict(state)


def _random_state(rank: int, world_size: int) -> str:
    return f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth"


def _require_convertible(saved: RunRecord, now: RunRecord, folder: Path) -> None:
    """Raise where the engines have no state in common.

    Raises:
        ValueError: One flattens parameters, or cuts the model itself.
    """
    for record, whose in ((saved, "it was saved"), (now, "this run is")):
        if record.layout.startswith("FSDP1") or record.shared > 1:
            raise ValueError(
                f"{folder} cannot be taken from {saved} to {now}: {whose} with {record.layout} and {record.shared} rank(s) "
                f"to each sample, whose parameters are not whole. Go on with {saved}, or start anew from the weights "
                "(`trainer-ext export`)."
            )
