"""`kava plan` and `kava status`: what a run will take, and how far it is."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from typing import Annotated

import typer

from ..errors import RecipeError
from .cli_run import plan_run
from .cli_store import OnlyTeacher, Overrides, RecipePath, load, out, print_table


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    teacher: OnlyTeacher = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", metavar="N", min=2, help="Count tokens of N samples, not of all.", show_default=False),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run every stage on a few samples, in a temporary folder, and measure.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a run will take: tokens, bytes, files, memory and hours; refuse one that is broken or cannot fit."""
    from .commands.choose import STAGES

    loaded = load(recipe, overrides)
    if teacher is not None:
        loaded.teacher(teacher)
    plan_run(loaded, list(STAGES), sample=sample, probe=probe, teacher=teacher, as_json=as_json)


def status(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until all is complete.")] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every", metavar="SECONDS", min=0.1, help="Between two looks of --watch; 5 on a terminal, else 60."
        ),
    ] = None,
) -> None:
    """Show what is complete, partial, missing or stale, and how the trained students did."""
    from .commands.status import survey, tables, watch_run

    if watch and as_json:
        raise RecipeError("--watch is for people; call kava status --json as often as you like")
    if every is not None and not watch:
        raise RecipeError("--every goes with --watch")
    if watch:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Watching leaves nothing to go on with.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            watch_run(lambda: survey(load(recipe, overrides)), out, every)
        return
    found = survey(load(recipe, overrides))
    if as_json:
        out.print_json(json.dumps(found))
        return
    for number, table in enumerate(tables(found)):
        if number:
            out.print()
        print_table(table)
