"""The sealed outputs of a run, next to its stores, compared with their records: for `kava verify` and `kava repair`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError, StoreNotFoundError
from ..store.sealed import RECORD, damaged_files, read_sealed, visible_files
from ..train.checkpoints import damaged_checkpoints
from ..train.settings import CHECKPOINTS
from .fuse.fusion import Fusion
from .generate_stage import damaged_answers
from .maps.projector import read_card
from .maps.projector import seal_problem as projector_problem
from .run import Run


@dataclass(frozen=True)
class Checked:
    """One output that was compared with its record."""

    label: str
    path: Path
    damages: tuple[str, ...]
    """One line for each file that is not as it was written."""


def check_outputs(run: Run) -> Iterator[Checked]:
    """Compare every sealed output of a run that exists with its record; nothing of the recipe is compared."""
    if run.recipe.extract.generate is not None and run.generated_dir.is_dir():
        yield Checked("generate", run.generated_dir, tuple(generated_damages(run.generated_dir)))
    if run.student_dir.is_dir():
        yield Checked("student", run.student_dir, tuple(folder_damages(run.student_dir)))
    for name in run.recipe.teachers:
        path = run.projector_path(name)
        if path.exists() or path.with_suffix(".json").exists():
            yield Checked(f"projector {name}", path, tuple(projector_damages(path)))
    if run.recipe.fuse is not None and (path := run.fusion_path(run.recipe.fuse.name)).exists():
        yield Checked("fusion", path, tuple(fusion_damages(path)))
    for parent, label in ((run.root / "students", "student"), (run.compare_dir, "compare")):
        for folder in sorted(path for path in parent.glob("[!.]*") if path.is_dir()):
            yield Checked(f"{label} {folder.name}", folder, tuple(trained_damages(folder)))


def folder_damages(folder: Path) -> list[str]:
    """Compare a folder with its record."""
    if not folder.is_dir():
        return []
    try:
        return damaged_files(folder, read_sealed(folder / RECORD))
    except FileNotFoundError:
        return [f"{folder / RECORD}: damaged: it is missing"] if visible_files(folder) else []
    except StoreError as error:
        return [str(error)]


def generated_damages(folder: Path) -> list[str]:
    """Compare a generated corpus with its record, and every file of answers with the hash in its name."""
    sealed = folder_damages(folder)
    return sealed + [line for line, path in damaged_answers(folder).items() if not any(str(path) in s for s in sealed)]


def trained_damages(folder: Path) -> list[str]:
    """Compare a trained student, or one in training with its checkpoints, with its record."""
    return [*folder_damages(folder), *damaged_checkpoints(folder / CHECKPOINTS)]


def projector_damages(path: Path) -> list[str]:
    """Compare a projector with its card."""
    try:
        card = read_card(path)
    except FileNotFoundError:
        return [] if not path.exists() else [f"{path.with_suffix('.json')}: damaged: it is missing"]
    except StoreError as error:
        return [str(error)]
    return [problem] if (problem := projector_problem(path, card)) else []


def fusion_damages(path: Path) -> list[str]:
    """Compare the file that says how targets are fused with its digest."""
    try:
        Fusion.load(path)
    except StoreNotFoundError:
        return []
    except StoreError as error:
        return [str(error)]
    return []
