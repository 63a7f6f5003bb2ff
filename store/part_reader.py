"""Reads a part; nothing of it is read before its table was checked."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedStoreError, SampleFailedError, StoreNotFoundError
from .dtypes import dtype_of
from .fingerprint import digest_json
from .manifest import Manifest
from .part import KV, ROW_ARRAYS, paged_arrays, part_name
from .quantize import LOSSY
from .sample import KVSample, Split
from .shard import PageReader


class PartReader:
    """Reads one committed part."""

    def __init__(self, root: Path, manifest: Manifest, index: int) -> None:
        self.root, self.manifest, self.index = root, manifest, index
        self.path = root / "parts" / part_name(index)
        self.attributes = self._read_attributes()
        for name, (size, _) in self.attributes["files"].items():
            try:
                found = (self.path / name).stat().st_size
            except OSError:
                raise DamagedStoreError(f"{self.path}: the file {name} is missing") from None
            if found != size:
                raise DamagedStoreError(f"{self.path}: the file {name} has {found} bytes, expected {size}")
        self._dtype, self._quantizer = dtype_of(manifest.dtype), LOSSY.get(manifest.codec)
        pages = self.attributes["num_rows"] // manifest.page_tokens
        self.pages = {name: PageReader(array, pages) for name, array in paged_arrays(manifest, self.path).items()}

    def __len__(self) -> int:
        return len(self.manifest.part_samples(self.index))

    @property
    def digest(self) -> str:
        """A digest of every byte of this part."""
        return str(self.attributes["digest"])

    @property
    def content(self) -> str:
        """What parts made from this one remember of it: its digest, or that of the part it was transcoded from.

        Two parts of stores with equal fingerprints and equal `content` hold the same numbers.
        """
        return str(self.attributes.get("content", self.digest))

    @property
    def sources(self) -> dict[str, str]:
        """The parent parts, as their `content` says."""
        return dict(self.attributes["sources"])

    @property
    def written_by(self) -> str:
        """What computed the part: a capture's backend and its version."""
        return str(self.attributes.get("written_by", ""))

    @property
    def statistics(self) -> dict[str, Any]:
        """Tokens with a target, and per layer the sums of their keys and values, and of the squares."""
        return dict(self.attributes["statistics"])

    @property
    def coverage(self) -> list[list[int]] | None:
        """Per segment: text tokens, those with a target, those that end with a parent's token; if resampled."""
        found: list[list[int]] | None = self.attributes.get("coverage")
        return found

    @property
    def failed(self) -> dict[int, str]:
        """Positions of failed samples, with the reason."""
        return {int(position): reason for position, reason in self.attributes["failed"].items()}

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids."""
        return [str(i) for i in self._array("sample_id")]

    @cached_property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens per sample."""
        return self._array("length")

    @cached_property
    def splits(self) -> np.ndarray[Any, Any]:
        """`Split` per sample."""
        return self._array("split")

    @cached_property
    def starts(self) -> np.ndarray[Any, Any]:
        """First row per sample."""
        return self._array("start")

    @property
    def order(self) -> list[int]:
        """Positions in the order in which they were written: read so, a part is read from front to back."""
        return [int(position) for position in np.lexsort((self.lengths, self.starts))]

    @cached_property
    def rows(self) -> dict[str, np.ndarray[Any, Any]]:
        """The per-token arrays of the whole part."""
        return {name: self._array(name) for name in ROW_ARRAYS}

    @cached_property
    def per_sample(self) -> dict[str, np.ndarray[Any, Any]]:
        """The extra arrays of samples, of the whole part."""
        return {name: self._array(name) for name, kind in self.manifest.extras.items() if kind.axis == "sample"}

    def sample(self, position: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """One sample; keys, values and extra arrays of rows are read and decoded only if asked for.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged.
        """
        if position in self.failed:
            raise SampleFailedError(f"{self.root}: sample {self.ids[position]!r} failed: {self.failed[position]}")
        start, length = int(self.starts[position]), int(self.lengths[position])
        rows = {name: array[start : start + length] for name, array in self.rows.items()}
        kv = {
            name: self.read(name, position) if wanted else None for name, wanted in zip(KV, (keys, values), strict=True)
        }
        return KVSample(
            sample_id=self.ids[position],
            split=Split(int(self.splits[position])),
            keys=None if kv["keys"] is None else self._dtype.to_torch(kv["keys"]),
            values=None if kv["values"] is None else self._dtype.to_torch(kv["values"]),
            extras=self._extras(position, rows=extras),
            **rows,
        )

    def read(self, name: str, position: int) -> np.ndarray[Any, Any]:
        """`keys` or `values` of one sample as the on-disk array `[t, l, h, d]`, or an extra array of its rows."""
        page = self.manifest.page_tokens
        start, length = int(self.starts[position]), int(self.lengths[position])
        first, count = start // page, -(-length // page)
        if self._quantizer is None or name not in KV:
            return self.pages[name].read(first, count)[:length]
        stored = {
            array: self.pages[array].read(first, min(1, count) if array.endswith("_exact") else count)
            for array in self._quantizer.arrays(name, self.manifest.geometry.shape, page, self._dtype)
        }
        return self._quantizer.decode(name, stored, length, page, self._dtype)

    def _extras(self, position: int, *, rows: bool) -> dict[str, np.ndarray[Any, Any]]:
        return {
            name: self.read(name, position) if name in self.pages else np.asarray(self.per_sample[name][position])
            for name in self.manifest.extras
            if rows or name not in self.pages
        }

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        import zarr

        try:
            array = zarr.open_array(self.path / name, mode="r")
            return np.asarray(array[:])
        except Exception as error:
            raise DamagedStoreError(f"{self.path}/{name}: {error}") from error

    def _read_attributes(self) -> dict[str, Any]:
        header = self.path / "zarr.json"
        try:
            attributes: dict[str, Any] = json.loads(header.read_text())["attributes"]["kava_part"]
            digest = digest_json({k: v for k, v in attributes.items() if k != "digest"})
            if attributes["digest"] != digest:
                raise DamagedStoreError(f"{header}: digest mismatch")
        except FileNotFoundError:
            raise StoreNotFoundError(f"{self.root}: part {self.index} is not written yet") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DamagedStoreError):
                raise
            raise DamagedStoreError(f"{header}: not readable: {error!r}") from None
        if attributes["store"] != self.manifest.fingerprint or attributes["index"] != self.index:
            raise DamagedStoreError(f"{self.path}: this part belongs to another store or place")
        return attributes
