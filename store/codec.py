"""What is done to a page between memory and disk, without loss; `quantize.py` has what is done before, with loss.

Every codec ends in CRC-32C: without a checksum in the chunk, flipped payload bits decode silently into wrong numbers.
A codec is one value here: its Zarr metadata, so that any Zarr v3 reader opens the store, and the same thing as a
function.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import google_crc32c
import numpy as np
from numcodecs import blosc

from ..errors import DamagedStoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Blosc's own threads fight with the part-level parallelism of dask and hang after a fork.
blosc.use_threads = False

_CRC: Final = struct.Struct("<I")
_BLOCK: Final = 1 << 20  # Blosc's automatic block size costs 12 % more disk and 2.5 times the decoding time.


def crc32c(data: Any) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object."""
    return int(google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data))


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

    def encode(self, page: np.ndarray[Any, Any]) -> bytes:
        """One page, C-contiguous and little-endian, as the bytes of its chunk."""
        payload: bytes = blosc.compress(page, b"zstd", 1, blosc.SHUFFLE, _BLOCK) if self.compress else page.tobytes()
        return payload + _CRC.pack(crc32c(payload))

    def decode(self, chunk: memoryview, out: np.ndarray[Any, Any], *, check: bool = True) -> None:
        """Checks the chunk's checksum, unless told not to, and decodes it into `out`, a whole C-contiguous page.

        Raises:
            DamagedStoreError: if the checksum or the size is wrong.
        """
        payload, (expected,) = bytes(chunk[:-4]), _CRC.unpack(chunk[-4:])
        if check and crc32c(payload) != expected:
            raise DamagedStoreError("checksum mismatch")
        if not self.compress:
            if len(payload) != out.nbytes:
                raise DamagedStoreError(f"chunk holds {len(payload)} bytes, expected {out.nbytes}")
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(payload, np.uint8)
            return
        nbytes = struct.unpack_from("<I", payload, 4)[0]  # Blosc 1 header: bytes 4 to 8 hold the raw size.
        if nbytes != out.nbytes:
            raise DamagedStoreError(f"chunk holds {nbytes} bytes, expected {out.nbytes}")
        blosc.decompress(payload, out)


CODECS: Final[dict[str, Codec]] = {
    "blosc-zstd": Codec("blosc-zstd", compress=True),
    "none": Codec("none", compress=False),
}


LOSSLESS_PART: Final = CODECS["blosc-zstd"]
"""What the arrays of a lossy codec go through."""
