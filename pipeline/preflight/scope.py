"""What a preflight is asked about: a run, and the stages that a command is going to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...errors import EXIT_USER, HubUnreachableError, KavaError, StoreError, StoreNotFoundError
from ...extract import Corpus
from ...store import KVStore
from ...store.files import is_writable
from ..places import read_record
from ..run import Run


@dataclass(frozen=True)
class Scope:
    """A run, and what the command does with it."""

    run: Run
    stages: frozenset[str]
    """Names of the stages that the command runs; `compare` for a comparison."""
    only_teacher: str | None = None
    """The teacher of `--teacher`; None for all."""
    scheduler: str | None = None
    """The value of `--scheduler`."""
    planning: bool = False
    """Whether nothing is run now: a model that only the hub has is then no problem."""

    @cached_property
    def corpus(self) -> Corpus | None:
        """The corpus that models read; before a teacher has written it, its prompts. None if it cannot be read."""
        try:
            return self.run.corpus
        except KavaError:
            pass
        try:
            return self.run.prompts
        except KavaError:
            return None

    @property
    def trains(self) -> bool:
        """Whether the command trains a student, or a plan is made of a training."""
        return bool({"train", "compare"} & self.stages)

    def runs_teacher(self, name: str) -> bool:
        """Whether a stage of the command runs this teacher on this machine."""
        extract = self.run.recipe.extract
        if self.only_teacher not in (None, name):
            return False
        writer = extract.generate and (extract.generate.teacher or next(iter(self.run.recipe.teachers)))
        if writer == name and "generate" in self.stages and "kept" not in read_record(self.run.generated_dir):
            return True
        if extract.keep == "target":
            captures = {"extract", "project"} & self.stages
            return bool(captures) and not _is_complete(self.run.target_path(name))
        return "extract" in self.stages and not _is_complete(self.run.teacher_path(name))

    def needs_teacher(self, name: str) -> bool:
        """Whether the teacher's model must be found: it is run, or nothing was captured from it yet."""
        outputs = [self.run.teacher_path(name), self.run.target_path(name)]
        if self.run.recipe.fuse is not None:
            outputs.append(self.run.target_path(self.run.recipe.fuse.name))
        return self.runs_teacher(name) or not any((path / "zarr.json").exists() for path in outputs)

    @cached_property
    def has_student(self) -> bool:
        """Whether the untrained student is in the run's folder, so that its origin is not needed."""
        try:
            return self.run.has_student
        except KavaError:  # A part of its key is not known yet: the corpus is still to be written.
            return False

    def writes(self) -> bool:
        """Whether a stage of the command has something to write; asked only where nothing can be written."""
        from ..stages import stages_of

        chosen = [stage for stage in stages_of(self.run) if stage.name in self.stages]
        return "compare" in self.stages or any(stage.look().state != "complete" for stage in chosen)

    def problems_of(self, check: Callable[[], object], *, key: str = "", reached: bool = True) -> Iterator[str]:
        """Run a check; yield the reason if it refuses the recipe.

        Faults of the machine and damage are left to the stage that meets them: they are no fault of the recipe.

        Args:
            check: raises a `KavaError` if something is wrong.
            key: the recipe's key, put in front of a reason that does not name it.
            reached: whether a model that only the hub has must be reached.
        """
        try:
            check()
        except HubUnreachableError as error:
            if reached and not self.planning:
                yield str(error)
        except KavaError as error:
            if error.exit_code == EXIT_USER:
                yield str(error) if not key or str(error).startswith(key) else f"{key}: {error}"


def is_read_only(folder: Path) -> bool:
    """Return whether a folder exists in which nothing can be created."""
    return folder.is_dir() and not is_writable(folder)


def _is_complete(path: Path) -> bool:
    try:
        return not KVStore.open(path).missing_parts()
    except StoreNotFoundError:
        return False
    except (StoreError, OSError):  # Whoever reads it reports the damage.
        return True
