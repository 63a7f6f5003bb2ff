"""Checkpoints of a training: sealed when they are complete, and compared with their record before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import DamagedStoreError
from ..store.files import disk_errors, fsync, remove
from ..store.sealed import RECORD, check_record, read_sealed, settle, write_record
from .checkpoint_files import check_checkpoint
from .ranks import Ranks

_DAMAGED: Final = "damaged-"
"""Put before the name of a checkpoint that is not as it was written: neither the Trainer nor `begin_at` counts it."""


def seal_checkpoint(folder: Path, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Flush a checkpoint that all ranks have written, and write its record, the last of its files.

    Args:
        folder: the checkpoint.
        state: what else the record says.
        ranks: all of which call this; on a network file system each flushes what it wrote itself.
    """
    ranks.wait()
    settle(folder)
    ranks.wait()
    if ranks.is_first:
        # Hidden ones too: of shards torch writes `.metadata`, which says where each number belongs.
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD]
        write_record(folder, state, files)


def remove_older(folder: Path, limit: int | None) -> None:
    """Remove all complete checkpoints but the newest `limit`; None to keep them all."""
    steps = sorted(_complete(folder))
    for step in steps[: -limit if limit else 0]:
        checkpoint = folder / f"checkpoint-{step}"
        # Without its record one that is removed in part is incomplete, not damaged.
        (checkpoint / RECORD).unlink()
        fsync(checkpoint)
        remove(checkpoint)


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the newest complete checkpoint, and its step."""
    steps = _complete(folder)
    return (folder / f"checkpoint-{max(steps)}", max(steps)) if steps else (None, 0)


def begin_at(folder: Path) -> tuple[Path | None, int, list[str]]:
    """Return the newest checkpoint that is as it was written, its step, and one line for each that is damaged.

    Incomplete checkpoints are removed: the Trainer counts them like any other. Damaged ones are renamed, so that they
    can be looked at until the training is complete.
    """
    damaged = []
    with disk_errors(folder):
        for path in folder.glob("checkpoint-*"):
            if not (path / RECORD).exists():
                remove(path)
        while (found := last_checkpoint(folder))[0] is not None:
            checkpoint = found[0]
            try:
                check_record(checkpoint, read_sealed(checkpoint / RECORD))
                break
            except DamagedStoreError as error:
                damaged.append(str(error).split(". ")[0])
                aside = checkpoint.with_name(_DAMAGED + checkpoint.name)
                remove(aside)
                checkpoint.rename(aside)
    if found[0] is not None:
        check_checkpoint(found[0])
    return *found, damaged


def damaged_checkpoints(folder: Path) -> list[str]:
    """Return one line for each complete checkpoint that is not as it was written."""
    lines = []
    for step in sorted(_complete(folder)):
        checkpoint = folder / f"checkpoint-{step}"
        try:
            check_record(checkpoint, read_sealed(checkpoint / RECORD))
        except DamagedStoreError as error:
            lines.append(str(error))
    lines += [f"{path}: damaged; it is not used" for path in sorted(folder.glob(f"{_DAMAGED}checkpoint-*"))]
    return lines


def _complete(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a record."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if (path / RECORD).exists()]
    return [int(name) for name in names if name.isdigit()]
