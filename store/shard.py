"""Zarr's sharding codec for arrays that are chunked along their first axis only.

A shard is the chunks' bytes one after the other, then an index of `(offset, nbytes)` pairs and its CRC-32C. Writing it
chunk by chunk needs the memory of one chunk. Other readers of Zarr use that index; kava reads chunks by the page table
of the part's index, which also lists the checksum that each chunk must have. zarr-python is the oracle in the tests.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ..errors import DamagedStoreError
from .codec import Chunk, Codec, crc32c
from .files import reading
from .hashing import FileHash
from .scratch import scratch

SHARD_BYTES: Final = 128 << 20
"""Raw bytes per shard, at most."""

SHARD_PAGES: Final = 1024
"""Chunks per shard, at most: an index has room for all of them, used or not."""

_ENCODER_OVERHEAD: Final = 64
"""Bytes by which an encoded page may exceed its raw size, checksum included."""
_EMPTY: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class PagedArray:
    """Name and layout of an array of a part: pages of rows, shards of pages."""

    name: str
    page_shape: tuple[int, ...]
    """`(page_tokens, ...)`; for keys and values `(page_tokens, num_layers, num_key_value_heads, head_dim)`."""
    dtype: str
    """NumPy dtype of the bytes on disk."""
    codec: Codec
    fill_value: int | float = 0
    """What Zarr reads where a chunk is missing."""
    meaning: str = ""
    """The dtype of the numbers; `bfloat16` is stored as its bits."""
    axes: tuple[str, ...] = ()
    """Dimension names."""

    @cached_property
    def page_bytes(self) -> int:
        """Raw bytes of one page."""
        return math.prod(self.page_shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def pages_per_shard(self) -> int:
        """Chunks in one shard."""
        return max(1, min(SHARD_PAGES, SHARD_BYTES // self.page_bytes))

    @cached_property
    def index_bytes(self) -> int:
        """At a shard's end: offset and size of every chunk that it could hold, and a checksum of these."""
        return 16 * self.pages_per_shard + 4

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard in its part, by Zarr's default chunk key encoding."""
        return "/".join([self.name, "c", str(shard), *["0"] * (len(self.page_shape) - 1)])


@dataclass(frozen=True)
class PageTable:
    """Where the chunks of an array are and which checksums they have; part of a part's index."""

    nbytes: np.ndarray[Any, Any]
    """`[pages]` uint32: bytes of each chunk, its stored checksum included."""
    checksums: np.ndarray[Any, Any]
    """`[pages]` uint32: CRC-32C of each chunk's payload."""

    def offsets(self, pages_per_shard: int) -> np.ndarray[Any, Any]:
        """Return the first byte `[pages]` of each chunk in its shard, where chunks follow each other without a gap."""
        stops = np.cumsum(self.nbytes, dtype=np.int64)
        starts = stops - self.nbytes
        first = np.repeat(starts[::pages_per_shard], pages_per_shard)[: len(starts)]
        return np.asarray(starts - first)


@dataclass
class PageWriter:
    """Writer of an array's pages, in order; a full shard is closed and the next one begun."""

    array: PagedArray
    part: Path
    """Folder of the part."""
    on_shard: Callable[[Path], None] = lambda shard: None
    """Called with the path of each finished shard."""
    files: dict[Path, tuple[int, str]] = field(default_factory=dict)
    """Size and hash of each finished shard."""
    _file: BinaryIO | None = None
    _hash: FileHash = field(default_factory=FileHash)
    _nbytes: list[int] = field(default_factory=list)
    _checksums: list[int] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """Pages written so far."""
        return len(self._nbytes)

    @property
    def table(self) -> PageTable:
        """The chunks written so far."""
        return PageTable(np.array(self._nbytes, "<u4"), np.array(self._checksums, "<u4"))

    def write(self, chunk: Chunk) -> None:
        """Write the next page, encoded by the array's codec."""
        if self.num_pages % self.array.pages_per_shard == 0:
            self._begin(self.num_pages // self.array.pages_per_shard)
        assert self._file is not None
        chunk.write(self._file, self._hash)
        self._nbytes.append(chunk.nbytes)
        self._checksums.append(chunk.checksum)
        if self.num_pages % self.array.pages_per_shard == 0:
            self.close()

    def close(self) -> None:
        """Write the index of the open shard, if there is one."""
        if self._file is None:
            return
        shard = (self.num_pages - 1) // self.array.pages_per_shard
        entries = shard_index(self.array, self.table, shard)
        Chunk(entries.tobytes(), crc32c(entries)).write(self._file, self._hash)
        self._file.close()
        self._file = None
        path = self.part / self.array.shard_name(shard)
        self.files[path] = (self._hash.size, self._hash.hexdigest)
        self.on_shard(path)

    def abort(self) -> None:
        """Close the file without finishing the shard."""
        if self._file is not None:
            with suppress(OSError):  # Buffered bytes that do not fit on a full disk are of no use anyway.
                self._file.close()
            self._file = None

    def _begin(self, shard: int) -> None:
        path = self.part / self.array.shard_name(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._hash = FileHash()


def shard_index(array: PagedArray, table: PageTable, shard: int) -> np.ndarray[Any, Any]:
    """Return the Zarr index of a shard: `[slots, 2]` uint64 `(offset, nbytes)`, all ones where a slot is empty."""
    slots = array.pages_per_shard
    pages = slice(shard * slots, (shard + 1) * slots)
    entries = np.full((slots, 2), _EMPTY, "<u8")
    used = len(table.nbytes[pages])
    entries[:used, 0] = table.offsets(slots)[pages]
    entries[:used, 1] = table.nbytes[pages]
    return entries


@dataclass
class PageReader:
    """Reader of runs of pages; it keeps no file open.

    Several threads may read at once: each has its own scratch memory for a chunk and a page.
    """

    array: PagedArray
    part: str
    """Folder of the part."""
    table: PageTable
    files: Mapping[str, Sequence[Any]]
    """Size and hash of every file of the part, by name."""
    check: bool = True
    """Compare each chunk with its checksum."""
    _paths: dict[int, str] = field(default_factory=dict)

    @property
    def num_pages(self) -> int:
        """Pages of the array."""
        return len(self.table.nbytes)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard, as the part's table says."""
        return [self._size(shard) for shard in range(-(-self.num_pages // self.array.pages_per_shard))]

    def _size(self, shard: int) -> int:
        """Return the bytes of a shard; -1 if the table does not name it."""
        return int(self.files.get(self.array.shard_name(shard), (-1,))[0])

    @property
    def offsets_nbytes(self) -> int:
        """Bytes of the offsets of all chunks, which are computed when the first one is read, and kept."""
        return self.num_pages * np.dtype(np.int64).itemsize

    def offset(self, page: int) -> int:
        """Return the first byte of a chunk in its shard."""
        return int(self._offsets[page])

    @cached_property
    def _offsets(self) -> np.ndarray[Any, Any]:
        return self.table.offsets(self.array.pages_per_shard)

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Return pages `first .. first + count`, joined: `[count * page_tokens, ...]` in the on-disk dtype.

        Raises:
            DamagedStoreError: naming the chunk.
        """
        if count < 0:
            raise IndexError(f"{count} pages")
        out = np.empty((count * self.array.page_shape[0], *self.array.page_shape[1:]), self.array.dtype)
        self.read_into(first, out)
        return out

    def read_into(self, first: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None = None) -> None:
        """Fill `out` with the rows from page `first` on.

        A page is decoded into `out` if `out` has room for all of it in one piece, else by way of a scratch page; so no
        more than a page is held in addition, however many rows there are.

        Args:
            first: the first page.
            out: `[rows, ...]` in the on-disk dtype; of a page that it cuts off, the first rows.
            layers: which entries of the second axis `out` holds; None for all. Pages are decoded whole in any case.

        Raises:
            DamagedStoreError: naming the chunk; `out` may hold some of the rows then.
        """
        rows = self.array.page_shape[0]
        count = -(-len(out) // rows)
        if first < 0 or first + count > self.num_pages:
            raise IndexError(f"pages {first}..{first + count} of {self.num_pages}")
        for shard, start, stop in self._runs(first, count):
            path = self.path(shard)
            with reading(path):
                file = self._open(path, shard)
                try:
                    self._read_run(file, path, start, out[(start - first) * rows : (stop - first) * rows], layers)
                finally:
                    os.close(file)

    def _open(self, path: str, shard: int) -> int:
        try:
            # A pipe in the place of a shard must not block, a link is not followed.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamagedStoreError(f"{path}: the shard is missing") from None
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self._size(shard):
            os.close(file)
            if not stat.S_ISREG(found.st_mode):
                raise DamagedStoreError(f"{path}: not a regular file")
            raise DamagedStoreError(f"{path}: the shard has {found.st_size} bytes, expected {self._size(shard)}")
        return file

    def _read_run(
        self, file: int, path: str, first: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None
    ) -> None:
        """Read the pages of one shard from page `first` of the array on."""
        array, rows = self.array, self.array.page_shape[0]
        page = done = first
        stop = first + -(-len(out) // rows)
        checksums: list[int | None] = [None] * (stop - first)
        if self.check:
            checksums = self.table.checksums[first:stop].tolist()
        try:
            if not array.codec.compress and layers is None and out.flags.c_contiguous:
                done += array.codec.read_run(file, self.offset(first), out, rows, checksums)
            for page in range(done, stop):
                begin = (page - first) * rows
                self._read_page(file, page, out[begin : begin + rows], layers, checksums[page - first])
        except (DamagedStoreError, RuntimeError, ValueError, struct.error) as error:
            raise DamagedStoreError(f"{path}: chunk {page}: {error}") from error

    def _read_page(
        self,
        file: int,
        page: int,
        out: np.ndarray[Any, Any],
        layers: Sequence[int] | None,
        checksum: int | None,
    ) -> None:
        array, codec = self.array, self.array.codec
        offset, nbytes = self.offset(page), int(self.table.nbytes[page])
        if nbytes > array.page_bytes + _ENCODER_OVERHEAD:
            raise DamagedStoreError(f"{nbytes} bytes for a page of {array.page_bytes}")
        if layers is None and len(out) == array.page_shape[0] and out.flags.c_contiguous:
            codec.read(file, offset, nbytes, out, checksum)
            return
        rows = scratch("page", array.page_bytes).view(array.dtype).reshape(array.page_shape)
        codec.read(file, offset, nbytes, rows, checksum)
        if layers is None:
            out[:] = rows[: len(out)]
            return
        for place, layer in enumerate(layers):
            out[:, place] = rows[: len(out), layer]

    def path(self, shard: int) -> str:
        """Return the path of a shard."""
        if shard not in self._paths:
            self._paths[shard] = f"{self.part}/{self.array.shard_name(shard)}"
        return self._paths[shard]

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield `(shard, first page, stop page)` for each shard that the pages are in."""
        slots, stop = self.array.pages_per_shard, first + count
        while first < stop:
            shard = first // slots
            end = min(stop, (shard + 1) * slots)
            yield shard, first, end
            first = end
