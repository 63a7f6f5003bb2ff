"""Hashes of files: XXH3 with 128 bits, as 32 hexadecimal digits.

The hash of a file must be of another family than the checksums inside it. Every chunk of a store ends in its own
CRC-32C, and the CRC of a message followed by its own CRC is a constant: a CRC over such a file depends on its length
alone. XXH3 reads 35 GB/s on one core, BLAKE3 7 and SHA-256 2. It detects corruption, not tampering.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from typing_extensions import Buffer

_BLOCK: Final = 1 << 22


class FileHash:
    """Hash of a file that is being written; feed it every byte in order."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.size = 0
        """Bytes fed so far."""

    def update(self, data: Buffer) -> None:
        """Add the next bytes."""
        self._state.update(data)
        self.size += memoryview(data).nbytes

    @property
    def hexdigest(self) -> str:
        """The hash of all bytes so far."""
        return self._state.hexdigest()


def hash_bytes(data: Buffer) -> str:
    """Return the hash of bytes, or of a C-contiguous array."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """Return the hash of a file's bytes, read in blocks; nothing is cached.

    Raises:
        OSError: if the file cannot be read.
    """
    state, buffer = xxhash.xxh3_128(), np.empty(_BLOCK, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := os.readv(file.fileno(), [buffer.data]):
            state.update(buffer.data[:count])
    return state.hexdigest()
