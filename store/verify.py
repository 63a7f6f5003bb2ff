"""Proof that nothing on disk changed since it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import VLenUTF8, Zstd

from ..errors import DamagedStoreError, StoreError
from .cpus import num_cpus
from .files import read_all, read_small, reading
from .hashing import hash_file
from .index import INDEX_FILE
from .part_reader import PartReader
from .shard import shard_index
from .table import HEADER_BYTES, check_files, header_bytes, read_table
from .zarr_headers import check_zarr_array

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
        good = read_small(header, HEADER_BYTES) == header_bytes({})
    except FileNotFoundError:
        return [Damage(None, "parts/zarr.json", None, (), "the file is missing")]
    except DamagedStoreError as error:
        return [Damage(None, "parts/zarr.json", None, (), _reason(error))]
    return [] if good else [Damage(None, "parts/zarr.json", None, (), "not as it was written")]


def verify_part(store: KVStore, number: int) -> list[Damage]:
    """Check one part: table, index, the hash of every file, every chunk, and that the small arrays equal the index."""
    file = "zarr.json"
    try:
        read_table(store.path, store.layout, number)
        file = INDEX_FILE
        part = PartReader(store.path, store.layout, number)
        part.part_index.check(store.manifest.page_tokens)
    except (StoreError, ValueError) as error:
        return [Damage(number, file, None, (), str(error))]
    files = part.table["files"]
    absent, changed = {}, {}
    for name, (size, digest) in files.items():
        array = name.split("/")[0]
        try:
            check_files(str(part.path), {name: (size, digest)})
            with reading(part.path / name):
                if hash_file(part.path / name) != digest:
                    changed[array] = "not as it was written"
            if name.endswith("/zarr.json"):
                check_zarr_array(part.path / name)
        except StoreError as error:
            absent[array] = _reason(error)
    present = {p.relative_to(part.path).as_posix() for p in part.path.rglob("*") if not p.is_dir() or p.is_symlink()}
    unknown = sorted(present - files.keys() - {"zarr.json"})
    damages = [Damage(number, name, None, (), "a file that was not written by kava") for name in unknown]
    damages += [Damage(number, array, None, (), reason) for array, reason in sorted(absent.items())]
    for array in sorted({*part.pages, *changed} - absent.keys()):
        chunks = list(_chunks(part, array)) if array in part.pages else []
        if array in changed and not chunks:
            chunks = [Damage(number, array, None, (), changed[array])]
        damages += chunks
    if not damages:
        try:
            damages += _differences(part)
        except (StoreError, FileNotFoundError) as error:  # Another process takes the part out just now.
            damages.append(Damage(number, file, None, (), str(error)))
    return damages


def _differences(part: PartReader) -> Iterator[Damage]:
    """Compare what other Zarr readers read, small arrays and shard indices, with the part's index."""
    index = part.part_index
    small: dict[str, np.ndarray[Any, Any]] = {
        "start": index.starts,
        "length": index.lengths.astype("<i4"),
        "split": index.splits.astype("|u1"),
    }
    expected = {name: np.ascontiguousarray(array).tobytes() for name, array in (small | dict(index.extras)).items()}
    expected["sample_id"] = VLenUTF8().encode(np.array(index.ids, dtype=object)) if len(part) else b""
    for name, data in expected.items():
        if not _is_small_array(part, name, data):
            yield Damage(part.index, name, None, (), "differs from the part's index")
    for name, pages in part.pages.items():
        for shard, size in enumerate(pages.sizes):
            entries = shard_index(pages.array, pages.table, shard).tobytes()
            with reading(pages.path(shard)), Path(pages.path(shard)).open("rb") as file:
                stored = read_all(file.fileno(), len(entries), size - pages.array.index_bytes)
            if stored != entries:
                yield Damage(part.index, name, None, (), f"the index of shard {shard} differs from the part's index")


def _is_small_array(part: PartReader, name: str, expected: bytes) -> bool:
    """Return whether a small array, which is one chunk or none, holds these bytes."""
    chunks = [file for file in part.table["files"] if file.startswith(f"{name}/c/")]
    if len(chunks) != bool(expected):
        return False
    if not expected:
        return True
    chunk = part.path / chunks[0]
    # A buffer of the expected size, because a small file may state any size. Whatever is not overwritten differs.
    decoded = np.frombuffer(expected, np.uint8) ^ 0xFF
    try:
        Zstd().decode(read_small(chunk, part.table["files"][chunks[0]][0])[:-4], decoded)
    except (RuntimeError, ValueError):
        return False
    return decoded.tobytes() == expected


def _reason(error: Exception) -> str:
    return "the file is missing" if isinstance(error, FileNotFoundError) else str(error).rsplit(": ", 1)[-1]


def _chunks(part: PartReader, name: str) -> Iterator[Damage]:
    """Decode every chunk of a paged array."""
    reader, page_tokens = part.pages[name], part.manifest.page_tokens
    for page in range(reader.num_pages):
        try:
            reader.read(page, 1)
        except DamagedStoreError as error:
            first = page * page_tokens
            owners = np.flatnonzero((part.starts <= first) & (first < part.starts + part.lengths)).tolist()
            samples = tuple(part.sample_id(position) for position in owners)
            yield Damage(part.index, name, page, samples, _reason(error))
