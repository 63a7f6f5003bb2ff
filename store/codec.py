"""What is done to a page between memory and disk, without loss; `quantize.py` has what is done before, with loss.

Every chunk ends in its CRC-32C, for other readers of Zarr. kava compares a chunk with the checksum that the part's
index lists for it, so that another chunk in its place is refused as well. A codec is one value here: its Zarr metadata,
so that any Zarr v3 reader opens the store, and the same thing as a function.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from awscrt import checksums
from numcodecs import blosc

from ..errors import DamagedStoreError
from .hashing import FileHash
from .scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

# Blosc's own threads fight with the part-level parallelism of dask and hang after a fork.
blosc.use_threads = False

_CRC: Final = struct.Struct("<I")
_HEADER: Final = struct.Struct("<4sIII")  # Of Blosc 1: versions and flags, raw bytes, block size, stored bytes.
_MISMATCH: Final = "checksum mismatch"
_PAGES_PER_CALL: Final = 256  # Two buffers each, and Linux takes 1024 buffers in one call.
_BLOCK: Final = 1 << 20  # Blosc's automatic block size costs 12 % more disk and 2.5 times the decoding time.


def crc32c(data: bytes | np.ndarray[Any, Any]) -> int:
    """CRC-32C (Castagnoli) of bytes or of a C-contiguous array, of which no copy is made."""
    return int(checksums.crc32c(data))


@dataclass(frozen=True)
class Chunk:
    """An encoded page; its file holds the payload and then the payload's CRC-32C."""

    payload: bytes | np.ndarray[Any, Any]
    checksum: int
    """CRC-32C of the payload."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file: payload and checksum."""
        return len(self.payload) + _CRC.size

    def write(self, file: BinaryIO, file_hash: FileHash) -> None:
        """Append the chunk to a file, and to the hash of that file."""
        for data in (self.payload if isinstance(self.payload, bytes) else self.payload.data, _CRC.pack(self.checksum)):
            file.write(data)
            file_hash.update(data)


@dataclass(frozen=True)
class Codec:
    """A lossless codec for pages; `compress=False` stores the bytes as they are, with a checksum."""

    name: str
    compress: bool

    def zarr_codecs(self, itemsize: int) -> Sequence[Any]:
        """The bytes-to-bytes codecs for `zarr.Group.create_array(compressors=...)`."""
        from zarr.codecs import BloscCodec, Crc32cCodec

        if not self.compress:
            return [Crc32cCodec()]
        shuffle = BloscCodec(typesize=itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=_BLOCK)
        return [shuffle, Crc32cCodec()]

    def encode(self, page: np.ndarray[Any, Any]) -> Chunk:
        """One page, C-contiguous and little-endian, as a chunk; of what is stored as it is, no copy is made."""
        flat = page.reshape(-1).view(np.uint8)
        payload = blosc.compress(page, b"zstd", 1, blosc.SHUFFLE, _BLOCK) if self.compress else flat
        return Chunk(payload, crc32c(payload))

    def read(self, file: int, offset: int, nbytes: int, out: np.ndarray[Any, Any], checksum: int | None) -> None:
        """Read the chunk at `offset` of an open file and decode it.

        Args:
            file: file descriptor; its position is neither used nor changed.
            offset: first byte of the chunk.
            nbytes: bytes of the chunk, its stored checksum included.
            out: a whole C-contiguous page.
            checksum: CRC-32C that the payload must have, from the index of the part; None to skip the check.

        Raises:
            DamagedStoreError: if the checksum or a size is wrong.
            RuntimeError: if Blosc cannot decode the payload.
            OSError: if the disk cannot read it.
        """
        if not self.compress:
            if nbytes != out.nbytes + _CRC.size:
                raise DamagedStoreError(f"chunk holds {nbytes - _CRC.size} bytes, expected {out.nbytes}")
            _fill(file, offset, out.nbytes, out.data)
            if checksum is not None and crc32c(out) != checksum:
                raise DamagedStoreError(_MISMATCH)
            return
        payload = scratch("chunk", nbytes - _CRC.size)
        _fill(file, offset, len(payload), payload.data)
        if checksum is not None and crc32c(payload) != checksum:
            raise DamagedStoreError(_MISMATCH)
        _, raw, _, stored_bytes = _HEADER.unpack_from(payload.data)
        if (raw, stored_bytes) != (out.nbytes, len(payload)):
            raise DamagedStoreError(
                f"chunk holds {stored_bytes} bytes for {raw}, expected {len(payload)} bytes for {out.nbytes}"
            )
        blosc.decompress(payload, out)

    def read_run(
        self, file: int, offset: int, out: np.ndarray[Any, Any], page_rows: int, expected: list[int | None]
    ) -> int:
        """Read consecutive pages that are stored uncompressed, with one system call for many of them.

        The end of `out` may cut the last page off; the rows behind it are not read. They are zeros in keys, values and
        tokens, so that the checksum of the whole page follows from its first rows.

        Args:
            file: file descriptor.
            offset: first byte of the first chunk.
            out: C-contiguous rows, the first of them the first of a page.
            page_rows: rows of a page.
            expected: CRC-32C of each page; None to skip its check.

        Returns:
            The number of pages that were read and checked. Reading the next one whole tells what is wrong with it: it
            is damaged, or it was cut off and does not end in zeros.

        Raises:
            DamagedStoreError: if the file ends within a page.
            OSError: if the disk cannot read it.
        """
        pages = [out[first : first + page_rows] for first in range(0, len(out), page_rows)]
        stored = scratch("checksum", _CRC.size)
        for first in range(0, len(pages), _PAGES_PER_CALL):
            buffers = [b for page in pages[first : first + _PAGES_PER_CALL] for b in (page.data, stored.data)]
            buffers.pop()
            nbytes = sum(buffer.nbytes for buffer in buffers)
            _fill(file, offset + first * (pages[0].nbytes + _CRC.size), nbytes, *buffers)
        for number, (page, checksum) in enumerate(zip(pages, expected, strict=True)):
            if checksum is None:
                continue
            found = crc32c(page)
            if missing := pages[0].nbytes * page_rows // len(pages[0]) - page.nbytes:
                found = checksums.combine_crc32c(found, _crc_of_zeros(missing), missing)
            if found != checksum:
                return number
        return len(pages)


@lru_cache(1 << 12)
def _crc_of_zeros(count: int) -> int:
    """Return the CRC-32C of `count` zero bytes."""
    return crc32c(bytes(count))


def _fill(file: int, offset: int, nbytes: int, *buffers: memoryview) -> None:
    done = os.preadv(file, buffers, offset)
    while done < nbytes:  # File servers and FUSE may give less than is there.
        more = os.preadv(file, _behind(done, buffers), offset + done)
        if not more:
            raise DamagedStoreError("the file ends within it")
        done += more


def _behind(done: int, buffers: Sequence[memoryview]) -> list[memoryview]:
    """What is left to fill of buffers that follow each other."""
    left = []
    for buffer in buffers:
        if done < buffer.nbytes:
            left.append(buffer.cast("B")[done:])
        done = max(0, done - buffer.nbytes)
    return left


CODECS: Final[dict[str, Codec]] = {
    "blosc-zstd": Codec("blosc-zstd", compress=True),
    "none": Codec("none", compress=False),
}


LOSSLESS_PART: Final = CODECS["blosc-zstd"]
"""What the arrays of a lossy codec go through."""
