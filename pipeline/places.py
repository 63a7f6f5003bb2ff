"""Where each output of a run lies, and what a folder of weights says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..store.sealed import RECORD as RECORD
from ..store.sealed import read_sealed


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder of weights; empty if there is none.

    Raises:
        DamagedStoreError: if it is not as it was written.
    """
    try:
        return read_sealed(folder / RECORD)
    except FileNotFoundError:
        return {}


class Places:
    """The paths of a run."""

    def __init__(self, root: Path, name: str) -> None:
        """The run at `root`, whose recipe trains a student called `name`."""
        self.root, self._trained = root, name

    @property
    def student_dir(self) -> Path:
        """The student before training, and its tokenizer."""
        return self.root / "student"

    @property
    def generated_dir(self) -> Path:
        """The corpus that a teacher wrote."""
        return self.root / "generated"

    def teacher_path(self, teacher: str) -> Path:
        """The capture of a teacher."""
        return self.root / "teachers" / f"{teacher}.zarr"

    @property
    def reference_path(self) -> Path:
        """The student's own keys and values before training, on the calibration samples."""
        return self.root / "reference.zarr"

    def resampled_path(self, teacher: str) -> Path:
        """A teacher's capture on the student's tokens."""
        return self.root / "resampled" / f"{teacher}.zarr"

    def projector_path(self, teacher: str) -> Path:
        """The fitted projector."""
        return self.root / "projectors" / f"{teacher}.safetensors"

    def target_path(self, teacher: str) -> Path:
        """The targets made from a teacher."""
        return self.root / "targets" / f"{teacher}.zarr"

    def fusion_path(self, name: str) -> Path:
        """How several teachers' targets are fused."""
        return self.root / "fusion" / f"{name}.json"

    def selected_path(self, teacher: str) -> Path:
        """The slots filled from a teacher's capture."""
        return self.root / "selected" / f"{teacher}.zarr"

    def trained_dir(self, name: str | None = None) -> Path:
        """A trained student."""
        return self.root / "students" / (name or self._trained)

    @property
    def compare_dir(self) -> Path:
        """The trainings of a comparison, and what they say of each other."""
        return self.root / "compare"
