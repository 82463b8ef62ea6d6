"""`SafeCheckpointsMixin`: a `Trainer` whose checkpoints are whole or not there, and which goes on from none that changed.

The stock `_save_checkpoint` writes where `_get_output_dir` tells it. While it runs that is a folder beside, from which
`write.Save` puts the checkpoint in its place. What the stock method does with the finished folder (an upload to the hub,
the rotation of older ones) comes after that.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.stateful import StatefulCallback
from trainer_ext.checkpoints.background import Background
from trainer_ext.checkpoints.elastic import ElasticResumeMixin
from trainer_ext.checkpoints.exact import ExactResumeMixin
from trainer_ext.checkpoints.ranks import Ranks
from trainer_ext.checkpoints.resume import BadCheckpointError, Choice, move_aside, named, newest_good
from trainer_ext.checkpoints.resumed import require_trusted_on_all_ranks
from trainer_ext.checkpoints.run_record import save_record
from trainer_ext.checkpoints.write import Save, remove_leftovers, rotate
from trainer_ext.engine import is_deepspeed
from trainer_ext.output_folder import refuse_links

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class SafeCheckpointsMixin(ElasticResumeMixin, ExactResumeMixin, _TrainerBase):
    """Put before a `Trainer` class among the bases, it makes that class's checkpoints atomic and verified.

    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is as it was saved; those that were
    passed over are renamed to `_bad-checkpoint-STEP`. One that is named has to be as it was saved.
    """

    _save_under_way: Save | None = None
    _last_save: Save | None = None
    _background: Background | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, from a checkpoint that verifies.

        Raises:
            BadCheckpointError: There are checkpoints, and none is as it was saved; or the one that is named is not; or a
                pickle in it names what could run commands. Nothing was loaded.
            ValueError: A link in the output folder leads out of it.
            CheckpointNotSavedError: A checkpoint could not be saved; those before it are as they were.
        """
        ranks = ranks_of(self.args)
        asked, output = resume_from_checkpoint, Path(str(self.args.output_dir))
        if wrong := ranks.on_every_node(lambda: _tidy(output)):
            raise ValueError(wrong[0])
        choice: Choice | None = None
        if asked is True:
            choice = newest_good(output, ranks)
        elif isinstance(asked, str | os.PathLike) and Path(asked).is_dir():
            choice = named(Path(asked), ranks)
        if choice is None:
            return self._train(asked, *args, **kwargs)
        require_trusted_on_all_ranks(choice.folder, self.args)
        for note in choice.notes():
            logger.warning(note)
        for folder in choice.passed_over:
            if wrong := ranks.once_for_each_storage(lambda folder=folder: move_aside(folder)):  # type: ignore[misc]
                raise BadCheckpointError(f"{folder} is not as it was saved, and cannot be moved aside: {wrong[0]}.")
        given = self.args.resume_from_checkpoint
        self.args.resume_from_checkpoint = str(choice.folder)  # for callbacks, which are told of it nowhere else
        try:
            return self._train(str(choice.folder), *args, **kwargs)
        finally:
            self.args.resume_from_checkpoint = given

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        self._background = Background() if getattr(self.args, "async_save", False) else None
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            if self._background is not None:
                self._background.finish_after_an_error()
            raise
        finally:
            self._background = None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The stock end, when the last save is whole."""
        if self._background is not None:
            self._background.finish()
        return super()._finalize_training(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._save_under_way is None else str(self._save_under_way.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        start, background = time.perf_counter(), self._background
        if background is not None:
            background.finish()
        save = self._write_checkpoint(model, trial)
        place_and_rotate = partial(self._place, save, self.state.best_model_checkpoint)
        if background is None:
            place_and_rotate()
            self._last_save = save
            self._push(save)
        else:
            background.start(place_and_rotate, partial(self._seal_and_push, save))
            self.log({"checkpoint_blocked_seconds": time.perf_counter() - start})

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> Save:
        """Have the stock method, the callbacks and the engine write all files beside."""
        run_dir, best = self._get_output_dir(trial), self.state.best_model_checkpoint
        ranks = ranks_of(self.args) if self._background is None else ranks_of(self.args, self._background.gather)
        save = Save(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", ranks)
        save.begin()
        self._save_under_way = save
        try:
            super()._save_checkpoint(model, trial)
            self._name_the_best(run_dir, best, save)
            self._save_what_callbacks_have(save.folder)
            if self.args.should_save:
                save_record(self, save.folder)
            engine: Any = self.model_wrapped
            if is_deepspeed(engine) and engine.checkpoint_engine.is_decoupled():
                engine._commit_decoupled_checkpoint()  # else it writes on after this
        except BaseException as error:
            self.state.best_model_checkpoint = best
            not_saved = save.give_up(error)
            if isinstance(error, Exception):
                raise not_saved from error
            raise
        finally:
            self._save_under_way = None
        return save

    def _place(self, save: Save, best: str | None) -> None:
        save.commit()
        if self.args.should_save:
            rotate(save.place.parent, self.args.save_total_limit, best)

    def _seal_and_push(self, save: Save) -> None:
        save.seal()
        self._push(save)

    def _push(self, save: Save) -> None:
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(save.place))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The stock method, at the end of which callbacks hear of a save and may put files into the checkpoint."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._last_save is not None:
            self._last_save.seal()
            self._last_save = None

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """The stock method, which pickles the training arguments, without the token among them."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._save_under_way is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        """The stock method, on a checkpoint that verifies: a file of the resumed one names it, and may name any folder.

        Raises:
            BadCheckpointError: The best checkpoint is not as it was saved, or a pickle in it could run commands.
        """
        best = Path(str(self.state.best_model_checkpoint))
        for note in named(best, ranks_of(self.args)).notes():
            logger.warning(note)
        require_trusted_on_all_ranks(best, self.args)
        super()._load_best_model()

    def _name_the_best(self, run_dir: str, best: str | None, save: Save) -> None:
        """Have the state name the place of the best checkpoint, where the stock method saw only the folder beside."""
        self.state.best_model_checkpoint = best
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if self.args.save_strategy in strategies and self.state.best_global_step:
            found = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step or os.path.exists(found):
                self.state.best_model_checkpoint = found
        if self.args.should_save:
            self.state.save_to_json(str(save.folder / TRAINER_STATE_NAME))

    def _save_what_callbacks_have(self, folder: Path) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StatefulCallback):
                callback.save_files(folder, self.args, self.state)


def _tidy(folder: Path) -> None:
    """What comes before a run in an output folder: a killed save is cleared away, and links in it are refused."""
    remove_leftovers(folder)
    refuse_links(folder)


def ranks_of(args: Any, gather: Callable[[Any], list[Any]] = of_all_ranks) -> Ranks:
    """This process among those of a run."""
    return Ranks(args.process_index == 0, args.local_process_index == 0, gather)
