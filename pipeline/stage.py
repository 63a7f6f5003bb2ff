"""What a stage is: one output of a run, and how its state is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import AlignmentError, DamagedStoreError, KavaError, StageError, StoreNotFoundError
from ..store.files import disk_errors, remove
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


@dataclass
class Stage(ABC):
    """One output of a run."""

    name: ClassVar[str]
    run: Run
    teacher: str | None = None
    """Stages that exist once per teacher."""
    share: Share = ALL
    """What this process makes of it; a stage without parts is made whole, by one of them."""

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

    def check(self) -> None:  # noqa: B027  # Most outputs need no check.
        """Makes sure that the output can be made, before the one that is there is thrown away.

        Raises:
            KavaError: if it cannot.
        """

    def notices(self) -> list[str]:
        """Lines for people, printed before the output is written."""
        return []

    @property
    @abstractmethod
    def output(self) -> Path:
        """The store or folder that this stage makes."""

    @abstractmethod
    def inspect(self) -> Status:
        """The state of the output, given inputs that are done."""

    @abstractmethod
    def make(self, scheduler: str | None) -> str:
        """Makes the output, or what is missing of it; returns a line for people."""

    def inputs(self) -> dict[Path, list[int]]:
        """The stores that it is made from, and the parts of each without which this process cannot begin."""
        return {}

    def status(self) -> Status:
        """The state of the output."""
        try:
            return self.inspect()
        except (AlignmentError, StageError, StoreNotFoundError) as error:
            state: State = "stale" if self.output.exists() else "blocked"
            return Status(state, str(error))
        except DamagedStoreError as error:
            return Status("damaged", str(error))

    def look(self) -> Status:
        """The state for those who only look: what keeps it from being told is part of it, not raised.

        What makes an output calls `status`, which says by its error what is wrong.
        """
        try:
            return self.status()
        except KavaError as error:
            return self.uncompared(error)

    def uncompared(self, error: KavaError) -> Status:
        """What there is of an output that cannot be compared with the recipe, because of `error`."""
        there = "it is there" if self.output.exists() else "it is not there"
        return Status("blocked", f"{there}, and cannot be compared with the recipe: {error}")

    def drop_share(self) -> None:
        """Removes what is this process's to make.

        Raises:
            StageError: if that cannot be told from the rest.
        """
        raise self.inseparable()

    def inseparable(self) -> StageError:
        """What is said if one of several processes is to make it again."""
        return StageError(
            f"{self.label}: what other ranks write would be thrown away too; remove {self.output} once, then start the "
            "ranks without --force"
        )

    def discard(self) -> None:
        """Removes the output; hidden first, so that a half-removed one is never taken for whole."""
        if not self.output.exists():
            return
        with disk_errors(self.output):
            doomed = self.output.with_name(f".{self.output.name}.discarded")
            remove(doomed)
            self.output.rename(doomed)
            remove(doomed)
