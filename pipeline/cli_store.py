"""The commands on stores themselves, and what the other commands share with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import EXIT_FAULT, RecipeError
from .cluster.options import Parts, Rank, WorldSize, share_of

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe: -s train.alpha=0.5. Repeatable."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Address of a dask scheduler (tcp://host:8786), or processes:N of this machine; its threads if not given."
    ),
]


OnlyTeacher = Annotated[str | None, typer.Option("--teacher", help="Only this teacher of the recipe.")]


def say(label: str, line: str) -> None:
    """Says what became of a stage."""
    out.print(f"{label + ':':<18} {line}", markup=False)


def load(path: Path, overrides: list[str] | None) -> Any:
    """The run that a recipe describes."""
    from .recipe import load_recipe
    from .run import Run

    return Run(load_recipe(path, overrides or ()))


def print_table(table: Table) -> None:
    """A table is cut to the terminal's width; in a file or a pipe nothing is."""
    console = out if out.is_terminal else Console(width=400, highlight=False)
    console.print(table)


def inspect(
    store: Annotated[
        Path,
        typer.Argument(metavar="STORE|RECIPE", help="A store, or a recipe for all its stores.", show_default=False),
    ],
    sample: Annotated[str | None, typer.Option(help="Show this sample's tokens: its number or its id.")] = None,
    align: Annotated[
        str | None, typer.Option(help="Show this sample's tokens against those of the teacher it was made from.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The run's recipe, for tokens and text; found beside the store if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a store: manifest, sizes, per-layer statistics, one sample's tokens and spans. Of a recipe, all stores."""
    if store.is_file():
        from .commands.inspect_run import inspect_run

        for option, value in (("--sample", sample), ("--align", align), ("--recipe", recipe)):
            if value is not None:
                raise RecipeError(
                    f"{option} {value}: needs one store, and {store} is a recipe. Name a store of the run"
                )
        inspect_run(load(store, None), out, as_json=as_json)
        return
    from .commands.inspect import inspect_store

    inspect_store(store, out, sample=sample, align=align, recipe=recipe, as_json=as_json)


def verify(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores to check.", show_default=False)],
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
) -> None:
    """Check every byte of every part against its checksums."""
    from ..progress import progress
    from ..store import KVStore, verify_store

    damaged, share = False, share_of(rank, world_size, parts)
    for path in stores:
        store = KVStore.open(path)
        share.check(store.manifest.num_parts, str(path))
        chosen = set(share.of(range(store.manifest.num_parts))) & set(store.committed_parts())
        with progress("verify", len(chosen), "parts") as advance:
            found = verify_store(store, on_part=lambda part, advance=advance: advance(1), parts=chosen)  # type: ignore[misc]
        for damage in found:
            err.print(f"{path}: {damage}", style="red", markup=False)
        missing = len(store.missing_parts())
        note = f", {missing} not written yet" if missing else ""
        if found:
            damaged = True
            err.print(
                f"{path}: {len(found)} damages in {len({d.part for d in found} - {None})} of {len(chosen)} parts{note}",
                markup=False,
            )
        else:
            out.print(f"{path}: {len(chosen)} parts are as they were written{note}", markup=False)
    if damaged:
        raise typer.Exit(EXIT_FAULT)


def repair(
    recipe: RecipePath,
    overrides: Overrides = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="NAME", help="Only this store: its stage (extract, 'project big') or its path."
        ),
    ] = None,
    teacher: OnlyTeacher = None,
    failed: Annotated[bool, typer.Option("--failed", help="Make parts with failed samples again too.")] = False,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
) -> None:
    """Check the recipe's stores, and make damaged parts again, those alone."""
    from .found_recipe import find_recipe
    from .repair import repair as repair_stores
    from .saved_recipe import save_recipe

    run = load(recipe, overrides)
    repaired = repair_stores(
        run,
        only=store,
        teacher=teacher,
        failed=failed,
        share=share_of(rank, world_size, parts),
        scheduler=scheduler,
        say=say,
    )
    if any(one.parts for one in repaired) and find_recipe(run.root) is None:  # It changes nothing else.
        save_recipe(run)


def transcode(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store to read.", show_default=False)],
    into: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write.", show_default=False)],
    codec: Annotated[
        str, typer.Option(help="blosc-zstd or none, which lose nothing; int8 or int4, which do.", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; the store's own if not given.")
    ] = None,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
) -> None:
    """Rewrite a store under another codec or dtype, part by part; run again, it goes on where it was stopped."""
    from ..progress import progress
    from ..store import KVStore
    from .transcode import transcode_store

    source, share = KVStore.open(store), share_of(rank, world_size, parts)
    share.check(source.manifest.num_parts, str(store))
    mine = set(share.of(range(source.manifest.num_parts)))
    with progress("transcode", len(mine & set(source.committed_parts())), "parts") as advance:
        made = transcode_store(
            source, into, codec, dtype, parts=mine, scheduler=scheduler, on_part=lambda part: advance(1)
        )
    before, after = source.size_on_disk(), made.size_on_disk()
    missing = len(source.missing_parts())
    content = "the same content" if made.manifest.fingerprint == source.manifest.fingerprint else "other content"
    out.print(
        f"{into}: {len(made.committed_parts())} parts, {after / 1e6:.1f} MB, {after / max(before, 1):.2f} of {store}; "
        f"{content}" + (f"; {missing} parts are not written yet there" if missing else ""),
        markup=False,
    )
