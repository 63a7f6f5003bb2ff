"""Proof that nothing on disk changed since it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DamagedStoreError, StoreError
from .cpus import num_cpus
from .files import file_crc32c, reading
from .part_reader import PartReader
from .table import header_bytes

if TYPE_CHECKING:
    from .store import KVStore


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    part: int | None
    """None for what belongs to no part."""
    array: str
    """The array, or `zarr.json` for the part's own table."""
    chunk: int | None
    """The page, for keys, values and extra arrays of rows."""
    sample_ids: tuple[str, ...]
    """The samples that cannot be trusted; empty if all of the part's."""
    reason: str

    def __str__(self) -> str:
        place = self.array if self.part is None else f"part {self.part}, {self.array}"
        place += "" if self.chunk is None else f", chunk {self.chunk}"
        samples = f" (sample {', '.join(self.sample_ids)})" if self.sample_ids else ""
        return f"{place}{samples}: {self.reason}"


def verify_store(
    store: KVStore,
    on_part: Callable[[int], None] = lambda part: None,
    *,
    parts: Iterable[int] | None = None,
) -> list[Damage]:
    """Checks the store's own two headers, and every committed part, several at once on threads.

    Args:
        store: what to check.
        on_part: called in this thread with the number of each part that was checked.
        parts: only these, of those that are committed.

    Returns:
        What is not as it was written, in the order of the parts.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    found = {-1: _verify_headers(store)}
    committed = store.committed_parts()
    chosen = committed if parts is None else sorted(set(committed) & set(parts))
    with ThreadPoolExecutor(num_cpus(), "kava-verify") as pool:
        tasks = {pool.submit(verify_part, store, number): number for number in chosen}
        try:
            for task in as_completed(tasks):
                found[tasks[task]] = task.result()
                on_part(tasks[task])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [damage for number in sorted(found) for damage in found[number]]


def _verify_headers(store: KVStore) -> list[Damage]:
    """The manifest was compared with its fingerprint when the store was opened; the header of `parts` holds nothing."""
    header = store.path / "parts" / "zarr.json"
    try:
        with reading(header):
            good = header.read_bytes() == header_bytes({})
    except FileNotFoundError:
        return [Damage(None, "parts/zarr.json", None, (), "the file is missing")]
    except DamagedStoreError as error:
        return [Damage(None, "parts/zarr.json", None, (), _reason(error))]
    return [] if good else [Damage(None, "parts/zarr.json", None, (), "not as it was written")]


def verify_part(store: KVStore, number: int) -> list[Damage]:
    """Checks one part: its table, each file's checksum, each chunk, each sample's rows."""
    try:
        part = PartReader(store.path, store.manifest, number)
    except StoreError as error:
        return [Damage(number, "zarr.json", None, (), str(error))]
    broken = {}
    for name, (_, checksum) in part.attributes["files"].items():
        try:
            with reading(part.path / name):
                if file_crc32c(part.path / name) != checksum:
                    broken[name] = "checksum mismatch"
        except (DamagedStoreError, FileNotFoundError) as error:
            broken[name] = _reason(error)
    present = {p.relative_to(part.path).as_posix() for p in part.path.rglob("*") if not p.is_dir() or p.is_symlink()}
    found = [
        Damage(number, name, None, (), "a file that was not written by kava")
        for name in sorted(present - part.attributes["files"].keys() - {"zarr.json"})
    ]
    arrays = {name.split("/")[0]: reason for name, reason in broken.items()}
    found += [Damage(number, a, None, (), reason) for a, reason in sorted(arrays.items()) if a not in part.pages]
    if found:
        return found
    try:
        found += _rows(part)
    except StoreError as error:
        return [Damage(number, "zarr.json", None, (), str(error))]
    for name in part.pages:
        damaged = list(_chunks(part, name))
        if not damaged and name in arrays:
            damaged = [Damage(number, name, None, (), f"{arrays[name]} outside the chunks")]
        found += damaged
    return found


def _reason(error: Exception) -> str:
    return "the file is missing" if isinstance(error, FileNotFoundError) else str(error).rsplit(": ", 1)[-1]


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
        except DamagedStoreError as error:
            samples = (owner[page],) if page in owner else ()
            found.append(Damage(part.index, name, page, samples, _reason(error)))
    return found
