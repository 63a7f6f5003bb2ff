"""The commands on stores themselves, and what the other commands share with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import EXIT_FAULT, RecipeError
from .cluster.options import Parts, Rank, WorldSize, share_of
from .cluster.share import Share

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
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE|STORE...", help="Recipes, for all of a run, or stores.", show_default=False),
    ],
    overrides: Overrides = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
) -> None:
    """Check every byte of stores, or of all outputs of a run, against their checksums and records."""
    damaged, share = False, share_of(rank, world_size, parts)
    for path in paths:
        if path.is_file() or path.suffix in (".yaml", ".yml"):
            damaged |= _verify_run(load(path, overrides), share)
        else:
            damaged |= _verify_store(path, share)
    if damaged:
        raise typer.Exit(EXIT_FAULT)


def _verify_run(run: Any, share: Share) -> bool:
    """Checks every output of a run; returns whether one is damaged."""
    from ..errors import StoreError
    from .sealed_outputs import check_outputs
    from .stages import stages_of
    from .store_stages import StoreStage

    damaged = False
    for stage in stages_of(run):
        if isinstance(stage, StoreStage) and stage.output.exists():
            try:
                damaged |= _verify_store(stage.output, share)
            except StoreError as error:
                err.print(f"{stage.output}: {error}", style="red", markup=False)
                damaged = True
    if share.parts is None and share.rank == 0:
        for checked in check_outputs(run):
            for damage in checked.damages:
                err.print(damage, style="red", markup=False)
            damaged |= bool(checked.damages)
            if not checked.damages:
                out.print(f"{checked.path}: {checked.label} is as it was written", markup=False)
    return damaged


def _verify_store(path: Path, share: Share) -> bool:
    """Checks this process's parts of a store; returns whether one is damaged."""
    from ..progress import progress
    from ..store import KVStore, verify_store

    store = KVStore.open(path)
    share.check(store.manifest.num_parts, str(path))
    chosen = set(share.of(range(store.manifest.num_parts))) & set(store.committed_parts())
    with progress("verify", len(chosen), "parts") as advance:
        found = verify_store(store, on_part=lambda part: advance(1), parts=chosen)
    for damage in found:
        err.print(f"{path}: {damage}", style="red", markup=False)
    missing = len(store.missing_parts())
    note = f", {missing} not written yet" if missing else ""
    if not found:
        out.print(f"{path}: {len(chosen)} parts are as they were written{note}", markup=False)
        return False
    damaged = len({d.part for d in found} - {None})
    err.print(f"{path}: {len(found)} damages in {damaged} of {len(chosen)} parts{note}", markup=False)
    return True


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
    """Check all outputs of a recipe and rebuild those that are damaged."""
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
