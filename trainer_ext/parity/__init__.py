"""Whether two training runs are the same run: recorded trajectories, their comparison, the modes to compare in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_ext.parity.comparison import Comparison, Tolerance, compare
    from trainer_ext.parity.matrix import Matrix
    from trainer_ext.parity.modes import Mode, find_mode
    from trainer_ext.parity.recording import TrainerRecorder
    from trainer_ext.parity.trajectory import Recorder, Trajectory

_HOMES = {
    "Comparison": "comparison",
    "Matrix": "matrix",
    "Mode": "modes",
    "Recorder": "trajectory",
    "Tolerance": "comparison",
    "TrainerRecorder": "recording",
    "Trajectory": "trajectory",
    "compare": "comparison",
    "find_mode": "modes",
}

__all__ = [
    "Comparison",
    "Matrix",
    "Mode",
    "Recorder",
    "Tolerance",
    "TrainerRecorder",
    "Trajectory",
    "compare",
    "find_mode",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"trainer_ext.parity.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trainer_ext.parity' has no attribute {name!r}")
