"""The options that split a stage, and what they come to."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ...errors import RecipeError
from .environment import rank_from_environment
from .share import Share, parse_parts

Rank = Annotated[
    str | None,
    typer.Option(
        "--rank",
        metavar="R",
        help="Make every N-th part, from part R on: with --world-size N. 'auto' asks srun, an array job or torchrun.",
    ),
]
WorldSize = Annotated[
    int | None, typer.Option("--world-size", metavar="N", min=1, help="How many ranks there are.", show_default=False)
]
Parts = Annotated[
    str | None, typer.Option("--parts", metavar="PARTS", help="Only these parts: 12-40 (both included), or 0-3,7.")
]
OnlyFailed = Annotated[
    bool, typer.Option("--only-failed", help="Make parts with failed samples, and damaged ones, again; no others.")
]


def share_of(rank: str | None, world_size: int | None, parts: str | None) -> Share:
    """The share that the options ask for.

    Raises:
        RecipeError: if they do not go together, or the environment does not say what `auto` asks it.
    """
    chosen = None if parts is None else parse_parts(parts)
    if rank == "auto":
        number, size = rank_from_environment(os.environ)
        if world_size not in (None, size):
            raise RecipeError(f"--world-size {world_size}: the environment says {size}; leave it out, or say --rank")
        return Share(number, size, chosen)
    if (rank is None) != (world_size is None):
        missing = "--rank R (from 0)" if rank is None else "--world-size N"
        raise RecipeError(f"--rank and --world-size go together; add {missing}, or say --rank auto under srun")
    if rank is None or world_size is None:
        return Share(parts=chosen)
    if not rank.isdigit() or int(rank) >= world_size:
        raise RecipeError(f"--rank {rank}: ranks of --world-size {world_size} are 0 to {world_size - 1}, or 'auto'")
    return Share(int(rank), world_size, chosen)
