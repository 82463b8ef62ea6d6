"""A callback that goes on where it was: its state is saved in `trainer_state.json` and comes back on every resume.

Transformers saves the state of every `ExportableState`, and restores it only where
`restore_callback_states_from_checkpoint` is on, which is off by default: an early stopping that resumes then counts its
patience from 0. Here the state comes back whenever a run goes on from a checkpoint, in any `Trainer`.
"""

import json
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StatefulCallback(TrainerCallback, ExportableState):
    """Base of callbacks with a state.

    A subclass names its constructor's arguments in `OPTIONS` and what it remembers in `REMEMBERED`: attributes of
    these names, with values that JSON can hold. A run that starts anew starts with the values that the constructor
    gives, whatever an earlier `train()` left behind. Where a subclass has its own `on_train_begin`, it calls this one
    first.
    """

    OPTIONS: tuple[str, ...] = ()
    REMEMBERED: tuple[str, ...] = ()

    def state(self) -> dict[str, dict[str, Any]]:
        """What `trainer_state.json` keeps."""
        return {
            "args": {name: getattr(self, name) for name in self.OPTIONS},
            "attributes": {name: getattr(self, name) for name in self.REMEMBERED},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the checkpoint remembers, or start anew."""
        found = self._saved(state) if state.global_step else None
        if found is None:
            found = type(self)(**self.state()["args"]).state()
        for name, value in found["attributes"].items():
            setattr(self, name, value)

    def save_files(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        """Write what is too large for `trainer_state.json` into a checkpoint that `CustomTrainer` is about to finish.

        Called on all ranks, with the folder in which the checkpoint's other files are already. A stock `Trainer` does
        not call it: there `on_save` is the place to do the same.
        """

    def _saved(self, state: TrainerState) -> dict[str, Any] | None:
        """This callback's entry: of several of its class the last with the same options, which is the newest."""
        saved = cast(dict[str, Any], state.stateful_callbacks)  # annotated as a list, which it is before loading
        entries = saved.get(type(self).__name__)
        if isinstance(entries, list):
            own = json.loads(json.dumps(self.state()["args"]))
            entries = next((entry for entry in reversed(entries) if entry["args"] == own), None)
        if entries is None:
            logger.warning(
                f"The checkpoint at step {state.global_step} knows no such {type(self).__name__}: it starts anew."
            )
        return entries
