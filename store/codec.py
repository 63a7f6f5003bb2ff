"""What is done to a page between memory and disk, without loss; `quantize.py` has what is done before, with loss.

Every codec ends in CRC-32C: without a checksum in the chunk, flipped payload bits decode silently into wrong numbers.
A codec is one value here: its Zarr metadata, so that any Zarr v3 reader opens the store, and the same thing as a
function.
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
from .scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

# Blosc's own threads fight with the part-level parallelism of dask and hang after a fork.
blosc.use_threads = False

_CRC: Final = struct.Struct("<I")
_HEADER: Final = struct.Struct("<4sIII")  # Of Blosc 1: versions and flags, raw bytes, block size, stored bytes.
_BLOCK: Final = 1 << 20  # Blosc's automatic block size costs 12 % more disk and 2.5 times the decoding time.


def crc32c(data: bytes | np.ndarray[Any, Any]) -> int:
    """CRC-32C (Castagnoli) of bytes or of a C-contiguous array, of which no copy is made."""
    return int(checksums.crc32c(data))


@dataclass(frozen=True)
class Chunk:
    """An encoded page: on disk, its payload and then its checksum."""

    payload: bytes | np.ndarray[Any, Any]
    checksum: int

    @property
    def nbytes(self) -> int:
        """Of both."""
        return len(self.payload) + _CRC.size

    def write(self, file: BinaryIO) -> None:
        """Writes both at the end of a file."""
        file.write(self.payload if isinstance(self.payload, bytes) else self.payload.data)
        file.write(_CRC.pack(self.checksum))

    def extend(self, checksum: int) -> int:
        """The checksum of a file's bytes, of which that of those before this chunk is given."""
        joined = checksums.combine_crc32c(checksum, self.checksum, len(self.payload))
        return int(checksums.crc32c(_CRC.pack(self.checksum), joined))


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

    def read_front(
        self, file: int, offset: int, nbytes: int, out: np.ndarray[Any, Any], page_bytes: int, *, check: bool = True
    ) -> bool:
        """Reads the first rows of a page that is stored as it is, and nothing behind them but the checksum.

        The rows behind a sample's end are zeros, of which the checksum is known without looking.

        Args:
            file: its descriptor.
            offset: first byte of the chunk.
            nbytes: of the chunk, checksum included.
            out: the first rows, C-contiguous.
            page_bytes: of the whole page.
            check: whether to compare the checksum.

        Returns:
            Whether `out` is what was written. If not, the page is compressed, does not end in zeros, or is damaged:
            reading it whole will tell.
        """
        if self.compress or nbytes != page_bytes + _CRC.size:
            return False
        _fill(file, offset, out.nbytes, out.data)
        if not check:
            return True
        stored = scratch("checksum", _CRC.size)
        _fill(file, offset + page_bytes, _CRC.size, stored.data)
        (expected,) = _CRC.unpack(stored.data)
        behind = page_bytes - out.nbytes
        return bool(checksums.combine_crc32c(crc32c(out), _of_zeros(behind), behind) == expected)

    def read(self, file: int, offset: int, nbytes: int, out: np.ndarray[Any, Any], *, check: bool = True) -> None:
        """Reads the chunk at `offset` of an open file and decodes it.

        Args:
            file: its descriptor; where it stands does not matter and does not change.
            offset: first byte of the chunk.
            nbytes: of the chunk, checksum included.
            out: a whole C-contiguous page.
            check: whether to compare the checksum.

        Raises:
            DamagedStoreError: if the checksum or a size is wrong.
            RuntimeError: if Blosc can make nothing of it.
            OSError: if the disk cannot give it back.
        """
        if not self.compress:  # The bytes on disk are the page's: they go straight to where they belong.
            if nbytes != out.nbytes + _CRC.size:
                raise DamagedStoreError(f"chunk holds {nbytes - _CRC.size} bytes, expected {out.nbytes}")
            stored = scratch("checksum", _CRC.size)
            _fill(file, offset, nbytes, out.data, stored.data)
            _compare(out, stored, check)
            return
        chunk = scratch("chunk", nbytes)
        _fill(file, offset, nbytes, chunk.data)
        payload = chunk[: -_CRC.size]
        _compare(payload, chunk[-_CRC.size :], check)
        _, raw, _, stored_bytes = _HEADER.unpack_from(payload.data)
        if (raw, stored_bytes) != (out.nbytes, len(payload)):
            raise DamagedStoreError(
                f"chunk holds {stored_bytes} for {raw} bytes, expected {len(payload)} for {out.nbytes}"
            )
        blosc.decompress(payload, out)


@lru_cache(1 << 12)
def _of_zeros(count: int) -> int:
    """The checksum of that many zeros."""
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


def _compare(payload: np.ndarray[Any, Any], stored: np.ndarray[Any, Any], check: bool) -> None:
    if check and crc32c(payload) != _CRC.unpack(stored.data)[0]:
        raise DamagedStoreError("checksum mismatch")


CODECS: Final[dict[str, Codec]] = {
    "blosc-zstd": Codec("blosc-zstd", compress=True),
    "none": Codec("none", compress=False),
}


LOSSLESS_PART: Final = CODECS["blosc-zstd"]
"""What the arrays of a lossy codec go through."""
