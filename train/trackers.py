"""Experiment trackers beside the log: transformers' own callbacks, of packages that the user installs.

Nothing leaves the machine unless its environment asks for it: wandb runs offline, trackio keeps its runs in a local
folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import BackendNotInstalledError

PROJECT: Final = "kava"
"""What runs are filed under."""
_CALLBACKS: Final = {"wandb": "WandbCallback", "trackio": "TrackioCallback"}


def check_trackers(names: Sequence[str]) -> None:
    """Checks that what the recipe reports to is installed.

    Raises:
        BackendNotInstalledError: naming the first that is not.
    """
    # The log itself needs tensorboard; an extra that the recipe names comes first.
    for name in sorted(names, key=lambda name: name not in _CALLBACKS):
        if find_spec(name) is None:
            package = f"kava[{name}]" if name in _CALLBACKS else name
            raise BackendNotInstalledError(f"train.report_to: {name} is not installed: pip install '{package}'")


def tracker_callbacks(names: Sequence[str], out: Path) -> list[Any]:
    """Callbacks for the Trainer, whose runs are named after the student.

    Args:
        names: of the trackers; `tensorboard` is none of them, it has a writer of its own.
        out: the student's folder, in which wandb writes.
    """
    if "wandb" in names:
        mode, project = os.environ.get("WANDB_MODE", "offline"), os.environ.get("WANDB_PROJECT", PROJECT)
        # The callback goes on with a run that is there.
        import_module("wandb").init(project=project, name=out.name, dir=str(out), mode=mode)
    integrations = import_module("transformers.integrations")
    return [getattr(integrations, _CALLBACKS[name])() for name in names if name in _CALLBACKS]


def finish_trackers(names: Sequence[str]) -> None:
    """Has all written that was logged: the callbacks leave a run open after the last evaluation."""
    for name in names:
        if name in _CALLBACKS:
            import_module(name).finish()
