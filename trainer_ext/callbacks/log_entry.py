"""What a callback adds to a log of the Trainer.

`Trainer.log` copies its values into `state.log_history` before any callback sees them, and the reporters of `report_to`
come before the callbacks of the user. So values are put into both, and a reporter shows them where the callback stands
before it: `trainer.callback_handler.callbacks.insert(0, callback)` in the place of `trainer.add_callback(callback)`.
"""

from transformers import TrainerState


def add_to_log(state: TrainerState, logs: dict[str, float], values: dict[str, float]) -> None:
    """Add `values` to the log that is under way, from `on_log`: for the callbacks after this one, and in the history."""
    logs.update(values)
    state.log_history[-1].update(values)
