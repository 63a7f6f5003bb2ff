"""A stage: one output of a run, where it is read and where it is written, and its state."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import AlignmentError, DamagedStoreError, KavaError, StageError, StoreNotFoundError
from ..store.files import disk_errors, remove
from ..store.replace import next_path, replace_with
from .cluster.share import ALL, Share
from .run import Run

State = Literal["missing", "partial", "complete", "stale", "blocked", "damaged"]


@dataclass(frozen=True)
class Status:
    """The state of one output."""

    state: State
    detail: str = ""
    """For people: how far it is, or why it is stale."""
    parts_done: int | None = None
    parts_total: int | None = None
    parts_outdated: int | None = None
    """Of those that are done, how many are to be made again."""
    failed_samples: int | None = None


def _denied(error: BaseException) -> str:
    """Return the path that this user must not read, if that is what an error comes from; else an empty string."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return str(cause.filename or "its files")
        cause = cause.__cause__ or cause.__context__
    return ""


@dataclass
class Stage(ABC):
    """One output of a run."""

    name: ClassVar[str]
    run: Run
    teacher: str | None = None
    """Stages that exist once per teacher."""
    share: Share = ALL
    """What this process makes of it; a stage without parts is made whole, by one of them."""
    beside: Path | None = None
    """Where the output is being rebuilt while the existing one stays in its place; None if it is written in place."""

    again: bool = False
    """Whether this process's parts are made again although they exist; see `make_share_again`."""

    @property
    def splits(self) -> bool:
        """Whether several processes may make it together."""
        return False

    @property
    def costly(self) -> bool:
        """Whether its output is not replaced without `--force`."""
        return False

    @property
    def label(self) -> str:
        """For people."""
        return self.name if self.teacher is None else f"{self.name} {self.teacher}"

    @property
    def _teacher(self) -> str:
        assert self.teacher is not None
        return self.teacher

    def notices(self) -> list[str]:
        """Lines for people, printed before the output is written."""
        return []

    @property
    @abstractmethod
    def output(self) -> Path:
        """The store, folder or file that this stage makes: where readers look."""

    @property
    def building(self) -> Path:
        """Where `make` writes and `inspect` looks: the output, or the rebuild that will replace it."""
        return self.output if self.beside is None else self.beside

    @abstractmethod
    def inspect(self) -> Status:
        """Return the state of what is at `building`, given inputs that are complete."""

    @abstractmethod
    def make(self, scheduler: str | None) -> str:
        """Make the output at `building`, or what is missing of it; return a line for people."""

    def summary(self, line: str) -> str:
        """Return the line for people about an output that replaced another one; `line` is what `make` returned."""
        return line

    def inputs(self) -> dict[Path, list[int]]:
        """The stores that it is made from, and the parts of each without which this process cannot begin."""
        return {}

    def status(self) -> Status:
        """The state of what is at `building`."""
        try:
            return self.inspect()
        except (AlignmentError, StageError, StoreNotFoundError) as error:
            state: State = "stale" if self.building.exists() else "blocked"
            return Status(state, str(error))
        except DamagedStoreError as error:
            if _denied(error):  # Whether it is damaged, its owner can tell.
                raise
            return Status("damaged", str(error))

    def look(self) -> Status:
        """The state for those who only look: what keeps it from being told is part of it, not raised.

        What makes an output calls `status`, which says by its error what is wrong.
        """
        try:
            return self.status()
        except (KavaError, OSError) as error:
            if denied := _denied(error):
                return Status("blocked", f"cannot be read: permission denied: {denied}")
            if not isinstance(error, KavaError):
                raise
            return self.uncompared(error)

    def uncompared(self, error: KavaError) -> Status:
        """What there is of an output that cannot be compared with the recipe, because of `error`."""
        there = "it is there" if self.output.exists() else "it is not there"
        return Status("blocked", f"{there}, and cannot be compared with the recipe: {error}")

    # Replacement: the existing output stays until the new one is complete.

    def next_place(self) -> Path:
        """Return where a replacement of the output is built.

        Raises:
            StageError: if the output must not be replaced.
        """
        return next_path(self.output)

    def rebuild(self) -> Stage:
        """Return this stage as it writes the replacement of its output."""
        return replace(self, beside=self.next_place())

    def begin(self) -> None:  # noqa: B027  # Most stages begin with their first file.
        """Create what other processes that join the rebuild look for; called under the stage's lock."""

    def is_begun(self) -> bool:
        """Return whether `building` holds anything that is worth keeping, or that another process is writing."""
        return os.path.lexists(self.building)

    def forget(self) -> None:
        """Remove what is at `building`: an attempt that wrote nothing, or a rebuild of something else."""
        with disk_errors(self.building):
            remove(self.building)

    def exchange(self) -> None:
        """Put the complete rebuild in the place of the output and remove the old one."""
        assert self.beside is not None
        replace_with(self.output, self.beside)
        self.beside = None

    def make_share_again(self, scheduler: str | None) -> str:
        """Rebuild this process's parts, and exchange each with the existing one when it is complete.

        Raises:
            StageError: if they cannot be told from the rest.
        """
        raise self.inseparable()

    def inseparable(self) -> StageError:
        """What is said if one of several processes is to make it again."""
        return StageError(
            f"{self.label}: what other ranks write would be thrown away too; remove {self.output} once, then start the "
            "ranks without --force"
        )
