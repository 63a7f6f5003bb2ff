"""`kava status`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import RecipeError
from .cli_store import Overrides, RecipePath, load, out, print_table


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
