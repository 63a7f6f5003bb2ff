"""Commands on a store that need no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def transcode(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store to read.", show_default=False)],
    into: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write.", show_default=False)],
    codec: Annotated[
        str, typer.Option(help="blosc-zstd or none, which lose nothing; int8 or int4, which do.", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; the store's own if not given.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a dask scheduler (tcp://host:8786), or processes:N of this machine; its threads if not "
            "given."
        ),
    ] = None,
) -> None:
    """Rewrite a store under another codec or dtype, part by part; run again, it goes on where it was stopped."""
    from ..progress import progress
    from ..store import KVStore
    from .cli import out
    from .transcode import transcode_store

    source = KVStore.open(store)
    with progress("transcode", len(source.committed_parts()), "parts") as advance:
        made = transcode_store(source, into, codec, dtype, scheduler=scheduler, on_part=lambda part: advance(1))
    before, after = source.size_on_disk(), made.size_on_disk()
    missing = len(source.missing_parts())
    content = "the same content" if made.manifest.fingerprint == source.manifest.fingerprint else "other content"
    out.print(
        f"{into}: {len(made.committed_parts())} parts, {after / 1e6:.1f} MB, {after / max(before, 1):.2f} of {store}; "
        f"{content}" + (f"; {missing} parts are not written yet there" if missing else ""),
        markup=False,
    )
