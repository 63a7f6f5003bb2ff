"""The index of a part: one small file with everything that is needed to find and check its samples.

A safetensors file, because it is a plain header and raw arrays, read in one piece and without running code. It holds,
for every sample, its rows, split and id and the extra arrays of samples; for every chunk of a paged array its size and
checksum; and the per-layer sums of keys and values. The part's table has the hash of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .manifest import Manifest
from .sample import Split
from .shard import PagedArray, PageTable

INDEX_FILE: Final = "index.safetensors"
"""Name of the file in a part."""
SAMPLE_FIELDS: Final = ("start", "length", "split", "sample_id_stop")
"""Columns of `samples`."""
MAX_INDEX_BYTES: Final = 1 << 30
"""Largest index that is read: some four million samples of a part, far more than kava writes into one."""

KV: Final = ("keys", "values")


@dataclass(frozen=True)
class PartIndex:
    """The index of a part, in memory."""

    samples: np.ndarray[Any, Any]
    """`[samples, 4]` int64: first row, tokens, split, and where the id ends in `ids_utf8`; see `SAMPLE_FIELDS`."""
    ids_utf8: np.ndarray[Any, Any]
    """`[bytes]` uint8: UTF-8 of all sample ids, joined."""
    sums: np.ndarray[Any, Any]
    """`[2, 2, l]` float64: of keys and of values, the sum of the numbers and of their squares, tokens with a target."""
    pages: Mapping[str, PageTable]
    """Chunks of every paged array by its name."""
    extras: Mapping[str, np.ndarray[Any, Any]]
    """Extra arrays of samples by name, `[samples, ...]`."""

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        """First row of each sample `[samples]`, a multiple of `page_tokens`."""
        return self.samples[:, 0]

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each sample `[samples]`; 0 if it failed."""
        return self.samples[:, 1]

    @property
    def splits(self) -> np.ndarray[Any, Any]:
        """`Split` of each sample `[samples]`."""
        return self.samples[:, 2]

    @property
    def ids(self) -> list[str]:
        """Sample ids."""
        data, stops = self.ids_utf8.tobytes(), self.samples[:, 3].tolist()
        return [data[start:stop].decode() for start, stop in zip([0, *stops], stops, strict=False)]

    def sample_id(self, position: int) -> str:
        """Return the id of one sample."""
        stops = self.samples[:, 3]
        start = int(stops[position - 1]) if position else 0
        return self.ids_utf8[start : int(stops[position])].tobytes().decode()

    @property
    def num_pages(self) -> int:
        """Pages of every paged array."""
        return len(next(iter(self.pages.values())).nbytes)

    def save(self) -> bytes:
        """Return the bytes of the file: the same for the same index, byte for byte."""
        from safetensors.numpy import save

        arrays = {"samples": self.samples, "sample_id": self.ids_utf8, "sums": self.sums}
        arrays |= {f"{name}.pages": np.stack([t.nbytes, t.checksums]) for name, t in self.pages.items()}
        arrays |= {f"{name}.value": array for name, array in self.extras.items()}
        return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def load(cls, data: bytes, manifest: Manifest, num_samples: int, arrays: Mapping[str, PagedArray]) -> PartIndex:
        """Read the bytes of the file.

        Args:
            data: content of the file.
            manifest: manifest of the store.
            num_samples: samples of the part.
            arrays: paged arrays of the part.

        Raises:
            ValueError: if an array is missing, has another shape or dtype, or numbers that cannot be.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            found = load(data)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"not a safetensors file of known dtypes: {error}") from None
        samples = _take(found, "samples", "<i8", (num_samples, len(SAMPLE_FIELDS)))
        ids = _take(found, "sample_id", "|u1", (None,))
        sums = _take(found, "sums", "<f8", (len(KV), 2, manifest.geometry.num_layers))
        tables = {name: PageTable(*_take(found, f"{name}.pages", "<u4", (2, None))) for name in arrays}
        extras = {
            name: _take(found, f"{name}.value", kind.numpy, (num_samples, *kind.shape))
            for name, kind in manifest.extras.items()
            if kind.axis == "sample"
        }
        if found:
            raise ValueError(f"array {next(iter(found))!r} is not one of this store's")
        if len({len(table.nbytes) for table in tables.values()}) > 1:
            raise ValueError("arrays have different numbers of pages")
        index = cls(samples, ids, sums, tables, extras)
        if num_samples:
            _, lengths, splits, _ = samples.max(axis=0).tolist()
            if samples.min() < 0 or lengths > index.num_pages * manifest.page_tokens:
                raise ValueError("samples: numbers that cannot be")
            if splits > max(Split):
                raise ValueError("samples: a split that is not known")
        return index

    def check(self, page_tokens: int) -> None:
        """Raise ValueError for samples whose rows or ids do not fit the part; readers check those that they read."""
        starts, lengths, _, id_stops = self.samples.T
        rows = self.num_pages * page_tokens
        if (starts % page_tokens).any() or (starts > rows - lengths).any():
            raise ValueError("samples: rows outside the part")
        if (id_stops[1:] < id_stops[:-1]).any() or (id_stops[-1] if len(id_stops) else 0) != len(self.ids_utf8):
            raise ValueError("sample_id: ends that do not fit the text")
        self.ids_utf8.tobytes().decode()
        # A UTF-8 byte 10xxxxxx continues a character, so no id begins with one.
        if (self.ids_utf8[id_stops[id_stops < len(self.ids_utf8)]] & 0xC0 == 0x80).any():
            raise ValueError("sample_id: an id that ends within a character")


def sample_table(
    starts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], splits: np.ndarray[Any, Any], ids: Sequence[str]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return `samples` and `ids_utf8` of a `PartIndex`."""
    encoded = [sample_id.encode() for sample_id in ids]
    stops = np.cumsum([len(data) for data in encoded], dtype=np.int64)
    samples = np.stack([np.asarray(column, "<i8") for column in (starts, lengths, splits, stops)], axis=1)
    return samples, np.frombuffer(b"".join(encoded), "|u1")


def _take(
    found: dict[str, np.ndarray[Any, Any]], name: str, dtype: str, shape: tuple[int | None, ...]
) -> np.ndarray[Any, Any]:
    """Remove an array from `found` and return it, if it has the dtype and the shape, in which None is any size."""
    array = found.pop(name, None)
    if array is None:
        raise ValueError(f"array {name!r} is missing")
    found_shape = tuple(None if size is None else own for own, size in zip(array.shape, shape, strict=False))
    if array.dtype != dtype or array.ndim != len(shape) or found_shape != shape:
        raise ValueError(f"array {name!r} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    return array
