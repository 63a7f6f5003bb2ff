"""Zarr's sharding codec for arrays that are chunked along their first axis only.

A shard is the chunks' bytes one after the other, then an index of `(offset, nbytes)` pairs and its CRC-32C. Writing it
chunk by chunk needs the memory of one chunk; reading is one `preadv` for each. zarr-python reads the same files
and is the oracle in the tests.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ..errors import DamagedStoreError
from .codec import Chunk, Codec, crc32c
from .files import read_all, reading
from .scratch import scratch

SHARD_BYTES: Final = 128 << 20
"""Raw bytes per shard, at most."""

SHARD_PAGES: Final = 1024
"""Chunks per shard, at most: an index has room for all of them, used or not."""

_EMPTY: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class PagedArray:
    """Where an array lies and how it is cut: pages of rows, shards of pages."""

    folder: Path
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

    def shard_path(self, shard: int) -> Path:
        """The file of a shard, by Zarr's default chunk key encoding."""
        return self.folder.joinpath("c", str(shard), *["0"] * (len(self.page_shape) - 1))


@dataclass
class PageWriter:
    """Appends pages; a full shard is closed and the next one begun."""

    array: PagedArray
    on_shard: Callable[[Path], None] = lambda shard: None
    """Called with the file of each shard that is whole."""
    num_pages: int = 0
    files: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Size and CRC-32C of the shards that are closed."""
    _file: BinaryIO | None = None
    _index: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 2), "<u8"))
    _offset: int = 0
    _checksum: int = 0

    def write(self, chunk: Chunk) -> None:
        """Writes the next page, as the array's codec encoded it."""
        slot = self.num_pages % self.array.pages_per_shard
        if slot == 0:
            self._begin(self.num_pages // self.array.pages_per_shard)
        assert self._file is not None
        chunk.write(self._file)
        self._checksum = chunk.extend(self._checksum)
        self._index[slot] = (self._offset, chunk.nbytes)
        self._offset += chunk.nbytes
        self.num_pages += 1
        if slot == self.array.pages_per_shard - 1:
            self.close()

    def close(self) -> None:
        """Writes the index of the open shard, if there is one."""
        if self._file is None:
            return
        index = Chunk(self._index.tobytes(), crc32c(self._index))
        index.write(self._file)
        self._file.close()
        self._file = None
        shard = self.array.shard_path((self.num_pages - 1) // self.array.pages_per_shard)
        self.files[shard] = (self._offset + index.nbytes, index.extend(self._checksum))
        self.on_shard(shard)

    def abort(self) -> None:
        """Closes the file without finishing the shard."""
        if self._file is not None:
            with suppress(OSError):  # What is still buffered does not fit on a full disk, and is not wanted.
                self._file.close()
            self._file = None

    def _begin(self, shard: int) -> None:
        path = self.array.shard_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._index = np.full((self.array.pages_per_shard, 2), _EMPTY, "<u8")
        self._offset = self._checksum = 0


@dataclass
class PageReader:
    """Reads runs of pages; holds the shard indices it has seen, and no open files.

    Several threads may read at once: each has a chunk and a page of scratch memory of its own.
    """

    array: PagedArray
    num_pages: int
    check: bool = True
    """Whether to compare each chunk with its checksum."""
    _indices: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    _paths: dict[int, str] = field(default_factory=dict)

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Pages `first .. first + count`, joined: `[count * page_tokens, ...]` in the on-disk dtype.

        Raises:
            DamagedStoreError: naming the chunk.
        """
        if count < 0:
            raise IndexError(f"{count} pages")
        out = np.empty((count * self.array.page_shape[0], *self.array.page_shape[1:]), self.array.dtype)
        self.read_into(first, out)
        return out

    def read_into(self, first: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None = None) -> None:
        """Fills `out` with the rows from page `first` on.

        A page goes straight to where it belongs if `out` has room for all of it in one piece, else by way of a scratch
        page; so no more than a page is held, however many rows there are.

        Args:
            first: the first page.
            out: `[rows, ...]` in the on-disk dtype; of a page that it cuts off, the first rows.
            layers: which entries of the second axis `out` holds; None for all. Pages are decoded whole all the same.

        Raises:
            DamagedStoreError: naming the chunk; `out` holds some of the rows then.
        """
        rows = self.array.page_shape[0]
        count = -(-len(out) // rows)
        if first < 0 or first + count > self.num_pages:
            raise IndexError(f"pages {first}..{first + count} of {self.num_pages}")
        for shard, start, stop in self._runs(first, count):
            path, index = self._path(shard), self.index(shard)[start:stop].tolist()
            with reading(path):
                try:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise DamagedStoreError(f"{path}: the shard is missing") from None
                try:
                    for page, (offset, nbytes) in enumerate(index, shard * self.array.pages_per_shard + start):
                        begin = (page - first) * rows
                        try:
                            self._read_page(file, offset, nbytes, out[begin : begin + rows], layers)
                        except (DamagedStoreError, RuntimeError, ValueError, struct.error) as error:
                            raise DamagedStoreError(f"{path}: chunk {page}: {error}") from error
                finally:
                    os.close(file)

    def _read_page(
        self, file: int, offset: int, nbytes: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None
    ) -> None:
        array, codec = self.array, self.array.codec
        if layers is None and out.flags.c_contiguous:
            if len(out) == array.page_shape[0]:
                codec.read(file, offset, nbytes, out, check=self.check)
                return
            if codec.read_front(file, offset, nbytes, out, array.page_bytes, check=self.check):
                return
        page = scratch("page", array.page_bytes).view(array.dtype).reshape(array.page_shape)
        codec.read(file, offset, nbytes, page, check=self.check)
        if layers is None:
            out[:] = page[: len(out)]
            return
        for place, layer in enumerate(layers):
            out[:, place] = page[: len(out), layer]

    def index(self, shard: int) -> np.ndarray[Any, Any]:
        """The `(offset, nbytes)` pairs of a shard's chunks that hold data, in order."""
        if shard not in self._indices:
            self._indices[shard] = self._read_index(shard)
        return self._indices[shard]

    def _read_index(self, shard: int) -> np.ndarray[Any, Any]:
        path, slots = self.array.shard_path(shard), self.array.pages_per_shard
        tail = self.array.index_bytes
        try:
            with reading(path), path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = read_all(file.fileno(), tail, max(0, size - tail))
        except FileNotFoundError:
            raise DamagedStoreError(f"{path}: the shard is missing") from None
        if len(data) < tail or struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
            raise DamagedStoreError(f"{path}: the shard's index is damaged")
        index = np.frombuffer(data[:-4], "<u8").reshape(slots, 2)
        used = index[: min(slots, self.num_pages - shard * slots)]
        # Each alone first: a sum of two such numbers could wrap around.
        if bool((used > size - tail).any()) or bool((used.sum(axis=1) > size - tail).any()):
            raise DamagedStoreError(f"{path}: the shard's index points outside its file")
        return used

    def _path(self, shard: int) -> str:
        if shard not in self._paths:
            self._paths[shard] = str(self.array.shard_path(shard))
        return self._paths[shard]

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        slots, stop = self.array.pages_per_shard, first + count
        while first < stop:
            shard, start = divmod(first, slots)
            end = min(slots, start + stop - first)
            yield shard, start, end
            first += end - start
