"""`kava inspect RECIPE`: all stores of a run, a row each."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import StoreError, StoreNotFoundError
from ...store import KVStore
from ..plan.plan import human
from ..run import Run
from ..stages import stages_of
from ..store_stages import StoreStage


def inspect_run(run: Run, out: Console, *, as_json: bool) -> None:
    """Print a summary of every store that the recipe describes, whether it exists or not."""
    rows = [_row(stage) for stage in stages_of(run) if isinstance(stage, StoreStage)]
    if as_json:
        out.print_json(json.dumps({"run_dir": str(run.root), "stores": rows}))
        return
    columns = ("stage", "parts", "samples", "failed", "tokens", "geometry", "as", "size", "store")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        if "parts" not in row:
            table.add_row(row["stage"], row.get("problem", "does not exist"), *[""] * 6, escape(row["path"]))
            continue
        table.add_row(
            row["stage"],
            f"{row['parts']} of {row['num_parts']}",
            f"{row['samples']:,}",
            f"{row['failed']:,}",
            f"{row['tokens']:,}",
            row["geometry"],
            f"{row['dtype']}, {row['codec']}",
            human(row["bytes"]),
            escape(row["path"]),
        )
    wide = out if out.is_terminal else Console(file=out.file, width=400, highlight=False)  # A pipe cuts nothing.
    wide.print(table)


def _row(stage: StoreStage) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage.label, "path": str(stage.output)}
    try:
        store = KVStore.open(stage.output)
        parts = store.committed_parts()
        return row | {
            "parts": len(parts),
            "num_parts": store.manifest.num_parts,
            "samples": sum(len(store.manifest.part_samples(part)) for part in parts),
            "failed": len(store.failed),
            "tokens": store.num_tokens,
            "geometry": str(store.geometry),
            "dtype": store.manifest.dtype,
            "codec": store.manifest.codec,
            "bytes": store.size_on_disk(),
            "fingerprint": store.manifest.fingerprint,
        }
    except StoreNotFoundError:
        return row
    except StoreError as error:
        return row | {"problem": str(error)}
