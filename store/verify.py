"""Proof that nothing on disk changed since it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DamagedStoreError, StoreError
from .files import file_crc32c
from .part_reader import PartReader

if TYPE_CHECKING:
    from .store import KVStore


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    part: int
    array: str
    """The array, or `zarr.json` for the part's own table."""
    chunk: int | None
    """The page, for keys, values and extra arrays of rows."""
    sample_ids: tuple[str, ...]
    """The samples that cannot be trusted; empty if all of the part's."""
    reason: str

    def __str__(self) -> str:
        place = f"part {self.part}, {self.array}" + ("" if self.chunk is None else f", chunk {self.chunk}")
        samples = f" (sample {', '.join(self.sample_ids)})" if self.sample_ids else ""
        return f"{place}{samples}: {self.reason}"


def verify_store(store: KVStore, on_part: Callable[[int], None] = lambda part: None) -> list[Damage]:
    """Checks every committed part: its table, each file's checksum, each chunk, each sample's rows."""
    found: list[Damage] = []
    for number in store.committed_parts():
        found += verify_part(store, number)
        on_part(number)
    return found


def verify_part(store: KVStore, number: int) -> list[Damage]:
    """Checks one part."""
    try:
        part = PartReader(store.path, store.manifest, number)
    except StoreError as error:
        return [Damage(number, "zarr.json", None, (), str(error))]
    broken = [name for name, (_, crc) in part.attributes["files"].items() if file_crc32c(part.path / name) != crc]
    present = {p.relative_to(part.path).as_posix() for p in part.path.rglob("*") if p.is_file()} - {"zarr.json"}
    found = [
        Damage(number, name, None, (), "a file that was not written by kava")
        for name in sorted(present - part.attributes["files"].keys())
    ]
    arrays = {name.split("/")[0] for name in broken}
    found += [Damage(number, a, None, (), "checksum mismatch") for a in sorted(arrays - part.pages.keys())]
    if found:
        return found
    found += _rows(part)
    for name in part.pages:
        damaged = list(_chunks(part, name))
        if not damaged and name in arrays:
            damaged = [Damage(number, name, None, (), "checksum mismatch outside the chunks")]
        found += damaged
    return found


def _rows(part: PartReader) -> list[Damage]:
    stop = part.starts + part.lengths
    wrong = (part.starts % part.manifest.page_tokens != 0) | (part.lengths < 0) | (stop > part.attributes["num_rows"])
    return [Damage(part.index, "start", None, (part.ids[i],), "rows outside the part") for i in np.flatnonzero(wrong)]


def _chunks(part: PartReader, name: str) -> list[Damage]:
    reader, page_tokens = part.pages[name], part.manifest.page_tokens
    owner = {}
    for position, (start, length) in enumerate(zip(part.starts.tolist(), part.lengths.tolist(), strict=True)):
        for page in range(start // page_tokens, -(-(start + length) // page_tokens) if length else 0):
            owner[page] = part.ids[position]
    found = []
    for page in range(reader.num_pages):
        try:
            reader.read(page, 1)
        except (DamagedStoreError, OSError) as error:
            samples = (owner[page],) if page in owner else ()
            found.append(Damage(part.index, name, page, samples, str(error).rsplit(": ", 1)[-1]))
    return found
