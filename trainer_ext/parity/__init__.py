"""Whether two training runs are the same run: recorded trajectories, their comparison, the modes to compare in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_ext.parity.causes import Diagnosis, diagnose
    from trainer_ext.parity.comparison import Comparison, assert_parity, compare
    from trainer_ext.parity.matrix import Matrix
    from trainer_ext.parity.modes import Mode, find_mode
    from trainer_ext.parity.recorder import Recorder
    from trainer_ext.parity.recording import TrainerRecorder
    from trainer_ext.parity.tolerance import Tolerance
    from trainer_ext.parity.trajectory import Evaluation, Step, Trajectory

_HOMES = {
    "Comparison": "comparison",
    "Diagnosis": "causes",
    "Evaluation": "trajectory",
    "Matrix": "matrix",
    "Mode": "modes",
    "Recorder": "recorder",
    "Step": "trajectory",
    "Tolerance": "tolerance",
    "TrainerRecorder": "recording",
    "Trajectory": "trajectory",
    "assert_parity": "comparison",
    "compare": "comparison",
    "diagnose": "causes",
    "find_mode": "modes",
}

__all__ = [
    "Comparison",
    "Diagnosis",
    "Evaluation",
    "Matrix",
    "Mode",
    "Recorder",
    "Step",
    "Tolerance",
    "TrainerRecorder",
    "Trajectory",
    "assert_parity",
    "compare",
    "diagnose",
    "find_mode",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"trainer_ext.parity.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trainer_ext.parity' has no attribute {name!r}")
