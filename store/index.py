"""The index of a part: one small file with everything that is needed to find and check its samples.

A safetensors file, because it is a plain header and raw arrays, read in one piece and without running code. It holds,
for every sample, its rows, split and id and the extra arrays of samples; for every chunk of a paged array its size and
checksum; and the per-layer sums of keys and values. The part's table has the hash of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from .manifest import Manifest
from .shard import PagedArray, PageTable

INDEX_FILE: Final = "index.safetensors"
"""Name of the file in a part."""
MAX_INDEX_BYTES: Final = 1 << 30
"""Largest index that is read: some four million samples of a part, far more than kava writes into one."""

KV: Final = ("keys", "values")
_SAMPLES: Final = {"start": "<i8", "length": "<i4", "split": "|u1", "sample_id.stop": "<i8"}
_ENCODER_OVERHEAD: Final = 64
"""Bytes by which an encoded page may exceed its raw size, checksum included."""


@dataclass(frozen=True)
class PartIndex:
    """The index of a part, in memory."""

    starts: np.ndarray[Any, Any]
    """`[samples]` int64: first row of each sample, a multiple of `page_tokens`."""
    lengths: np.ndarray[Any, Any]
    """`[samples]` int32: tokens of each sample; 0 if it failed."""
    splits: np.ndarray[Any, Any]
    """`[samples]` uint8: see `Split`."""
    encoded_ids: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    """UTF-8 bytes of all sample ids, joined, `[bytes]` uint8; and where each of them ends, `[samples]` int64."""
    extras: Mapping[str, np.ndarray[Any, Any]]
    """Extra arrays of samples by name, `[samples, ...]`."""
    sums: Mapping[str, np.ndarray[Any, Any]]
    """`keys` and `values`: `[2, l]` float64, the sum of the numbers and of their squares over tokens with a target."""
    pages: Mapping[str, PageTable]
    """Chunks of every paged array by its name."""

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids."""
        data, stops = self.encoded_ids[0].tobytes(), self.encoded_ids[1].tolist()
        return [data[start:stop].decode() for start, stop in zip([0, *stops], stops, strict=False)]

    def sample_id(self, position: int) -> str:
        """Return the id of one sample."""
        data, stops = self.encoded_ids
        return data[int(stops[position - 1]) if position else 0 : int(stops[position])].tobytes().decode()

    def save(self) -> bytes:
        """Return the bytes of the file: the same for the same index, byte for byte."""
        arrays = {
            "start": self.starts,
            "length": self.lengths,
            "split": self.splits,
            "sample_id.utf8": self.encoded_ids[0],
            "sample_id.stop": self.encoded_ids[1],
            **{f"{name}.sums": self.sums[name] for name in KV},
            **{f"{name}.value": array for name, array in self.extras.items()},
            **{f"{name}.nbytes": table.nbytes for name, table in self.pages.items()},
            **{f"{name}.checksum": table.checksums for name, table in self.pages.items()},
        }
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def load(cls, data: bytes, manifest: Manifest, samples: int, arrays: Mapping[str, PagedArray]) -> PartIndex:
        """Read the bytes of the file; the arrays share their memory.

        Args:
            data: the file.
            manifest: of the store.
            samples: samples of the part.
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
        per_sample = {name: _take(found, name, dtype, (samples,)) for name, dtype in _SAMPLES.items()}
        layers = manifest.geometry.num_layers
        index = cls(
            starts=per_sample["start"],
            lengths=per_sample["length"],
            splits=per_sample["split"],
            encoded_ids=(_take(found, "sample_id.utf8", "|u1", None), per_sample["sample_id.stop"]),
            extras={
                name: _take(found, f"{name}.value", kind.numpy, (samples, *kind.shape))
                for name, kind in manifest.extras.items()
                if kind.axis == "sample"
            },
            sums={name: _take(found, f"{name}.sums", "<f8", (2, layers)) for name in KV},
            pages={
                name: PageTable(*(_take(found, f"{name}.{what}", "<u4", None) for what in ("nbytes", "checksum")))
                for name in arrays
            },
        )
        if found:
            raise ValueError(f"array {next(iter(found))!r} is not one of this store's")
        index._check(manifest.page_tokens, arrays)
        return index

    @property
    def num_pages(self) -> int:
        """Pages of every paged array."""
        return len(next(iter(self.pages.values())).nbytes)

    def _check(self, page_tokens: int, arrays: Mapping[str, PagedArray]) -> None:
        """Raise ValueError for numbers with which reading would leave the part."""
        rows = self.num_pages * page_tokens
        starts, stops = self.starts, self.starts + self.lengths
        utf8, ends = self.encoded_ids
        bounds = np.concatenate([np.zeros(1, np.int64), ends])
        tables = self.pages.items()
        for what, good in (
            ("start", not len(starts) or (starts.min() >= 0 and not (starts % page_tokens).any())),
            ("length", not len(starts) or (self.lengths.min() >= 0 and stops.max() <= rows)),
            ("sample_id", bool((np.diff(bounds) >= 0).all()) and bounds[-1] == len(utf8)),
            ("pages", all(len(array) == self.num_pages for _, t in tables for array in (t.nbytes, t.checksums))),
            (
                "nbytes",
                all(not len(t.nbytes) or t.nbytes.max() <= arrays[n].page_bytes + _ENCODER_OVERHEAD for n, t in tables),
            ),
        ):
            if not good:
                raise ValueError(f"{what}: numbers that do not fit the part")
        utf8.tobytes().decode()


def encode_ids(ids: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ids' UTF-8 bytes, joined, and where each of them ends."""
    encoded = [sample_id.encode() for sample_id in ids]
    stops = np.cumsum([len(data) for data in encoded], dtype="<i8")
    return np.frombuffer(b"".join(encoded), "|u1"), stops.astype("<i8")


def _take(
    found: dict[str, np.ndarray[Any, Any]], name: str, dtype: str, shape: tuple[int, ...] | None
) -> np.ndarray[Any, Any]:
    """Remove an array from `found` and return it, if it has the dtype and the shape."""
    if name not in found:
        raise ValueError(f"array {name!r} is missing")
    array = found.pop(name)
    if array.dtype != np.dtype(dtype) or (array.shape != shape if shape is not None else array.ndim != 1):
        raise ValueError(f"array {name!r} is {array.dtype} {array.shape}, expected {dtype} {shape or '(any,)'}")
    return array
