"""The student: trained from cached targets alone.

Nothing here imports an extraction backend or opens a teacher's weights; all that is known of the teacher is in the
target store. `student` makes the student, `data` reads targets, `losses` compares, `training` is a training as a whole,
`trainer` the Hugging Face Trainer with one loss of its own. Names that need torch are imported when they are first
used, so that reading a recipe does not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import ByteLevelBPE, StudentSettings, TrainSettings

if TYPE_CHECKING:
    from .data import TargetCollator, TargetDataset
    from .losses import LOSSES, KVLoss
    from .student import load_student, make_student
    from .training import TrainResult, train_student

_LAZY = {
    "TargetCollator": "data",
    "TargetDataset": "data",
    "LOSSES": "losses",
    "KVLoss": "losses",
    "load_student": "student",
    "make_student": "student",
    "TrainResult": "training",
    "train_student": "training",
}

__all__ = [
    "LOSSES",
    "ByteLevelBPE",
    "KVLoss",
    "StudentSettings",
    "TargetCollator",
    "TargetDataset",
    "TrainResult",
    "TrainSettings",
    "load_student",
    "make_student",
    "train_student",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
