"""The parts that one process makes of a stage: those it was told, and of these every N-th."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from ...errors import RecipeError


@dataclass(frozen=True)
class Share:
    """What one of `world_size` processes makes. It depends on nothing that is on the disk, so no two make one part."""

    rank: int = 0
    world_size: int = 1
    parts: frozenset[int] | None = None
    """Only these; None for all."""

    @property
    def is_all(self) -> bool:
        """Whether this process makes everything."""
        return self.world_size == 1 and self.parts is None

    def of(self, parts: Collection[int]) -> list[int]:
        """Those of `parts` that this process makes, ascending."""
        chosen = sorted(parts if self.parts is None else self.parts & set(parts))
        return chosen[self.rank :: self.world_size]

    def check(self, num_parts: int, where: str) -> None:
        """Makes sure that the parts that were named exist.

        Raises:
            RecipeError: if one does not.
        """
        if self.parts is not None and (beyond := sorted(p for p in self.parts if p >= num_parts)):
            raise RecipeError(f"--parts: {where} has parts 0 to {num_parts - 1}, there is no part {beyond[0]}")

    def __str__(self) -> str:
        rank = f"rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        parts = "" if self.parts is None else f"parts {format_parts(self.parts)}"
        return ", ".join(filter(None, (rank, parts)))


ALL: Final = Share()
"""What a process makes that was not given a share: everything."""


def parse_parts(text: str) -> frozenset[int]:
    """`12-40` (both included), or several of these with commas: `0-3,7`.

    Raises:
        RecipeError: if it is not that.
    """
    found: set[int] = set()
    for piece in text.split(","):
        made = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", piece)
        if made is None:
            raise RecipeError(f"--parts {text}: write 12-40, which includes both, or a list like 0-3,7")
        first, last = int(made[1]), int(made[2] or made[1])
        if last < first:
            raise RecipeError(f"--parts {text}: {first}-{last} goes backwards")
        if last - first > 10_000_000:
            raise RecipeError(f"--parts {text}: no store has that many parts")
        found.update(range(first, last + 1))
    return frozenset(found)


def format_parts(parts: Collection[int]) -> str:
    """The reverse of `parse_parts`, shortest first."""
    runs: list[list[int]] = []
    for part in sorted(parts):
        if runs and runs[-1][1] == part - 1:
            runs[-1][1] = part
        else:
            runs.append([part, part])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
