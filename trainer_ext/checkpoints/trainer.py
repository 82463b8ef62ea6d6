"""`SafeCheckpointsMixin`: a `Trainer` whose checkpoints are whole or not there, and which goes on from none that changed.

The stock `_save_checkpoint` writes where `_get_output_dir` tells it. While it runs that is a folder beside, from which
`write.Save` puts the checkpoint in its place. What the stock method does with the finished folder (an upload to the hub,
the rotation of older ones) comes after that.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.stateful import StatefulCallback
from trainer_ext.checkpoints.ranks import Ranks
from trainer_ext.checkpoints.resume import BadCheckpointError, Choice, move_aside, named, newest_good
from trainer_ext.checkpoints.resumed import require_trusted_on_all_ranks
from trainer_ext.checkpoints.write import Save, remove_leftovers
from trainer_ext.engine import is_deepspeed

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class SafeCheckpointsMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it makes that class's checkpoints atomic and verified.

    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is as it was saved; those that were
    passed over are renamed to `_bad-checkpoint-STEP`. One that is named has to be as it was saved.
    """

    _save_under_way: Save | None = None
    _last_save: Save | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, from a checkpoint that verifies.

        Raises:
            BadCheckpointError: There are checkpoints, and none is as it was saved; or the one that is named is not; or a
                pickle in it names what could run commands. Nothing was loaded.
            CheckpointNotSavedError: A checkpoint could not be saved; those before it are as they were.
        """
        ranks = ranks_of(self.args)
        asked, output = resume_from_checkpoint, Path(str(self.args.output_dir))
        ranks.on_every_node(lambda: remove_leftovers(output))
        choice: Choice | None = None
        if asked is True:
            choice = newest_good(output, ranks)
        elif isinstance(asked, str | os.PathLike) and Path(asked).is_dir():
            choice = named(Path(asked), ranks)
        if choice is None:
            return super().train(asked, *args, **kwargs)
        require_trusted_on_all_ranks(choice.folder, self.args)
        for note in choice.notes():
            logger.warning(note)
        for folder in choice.passed_over:
            if wrong := ranks.once_for_each_storage(lambda folder=folder: move_aside(folder)):  # type: ignore[misc]
                raise BadCheckpointError(f"{folder} is not as it was saved, and cannot be moved aside: {wrong[0]}.")
        given = self.args.resume_from_checkpoint
        self.args.resume_from_checkpoint = str(choice.folder)  # for callbacks, which are told of it nowhere else
        try:
            return super().train(str(choice.folder), *args, **kwargs)
        finally:
            self.args.resume_from_checkpoint = given

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._save_under_way is None else str(self._save_under_way.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, best = self._get_output_dir(trial), self.state.best_model_checkpoint
        save = Save(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", ranks_of(self.args))
        save.begin()
        self._save_under_way = save
        try:
            super()._save_checkpoint(model, trial)
            self._name_the_best(run_dir, best, save)
            self._save_what_callbacks_have(save.folder)
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
        save.commit()
        self._last_save = save
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(save.place))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The stock method, at the end of which callbacks hear of a save and may put files into the checkpoint."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._last_save is not None:
            self._last_save.seal()
            self._last_save = None

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


def ranks_of(args: Any) -> Ranks:
    """This process among those of a run."""
    return Ranks(args.process_index == 0, args.local_process_index == 0, of_all_ranks)
