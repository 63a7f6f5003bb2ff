"""Reads a part; nothing of it is read before its table was checked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedStoreError, SampleFailedError, StoreError
from .dtypes import dtype_of
from .files import file_crc32c, reading
from .fingerprint import file_stamp
from .manifest import Manifest
from .part import KV, ROW_ARRAYS, paged_arrays, part_name
from .quantize import LOSSY
from .sample import KVSample, Split
from .shard import PageReader
from .table import read_table


class PartReader:
    """Reads one committed part."""

    def __init__(self, root: Path, manifest: Manifest, index: int, *, check: bool = True) -> None:
        """Opens part `index` of the store at `root`; `check=False` leaves the checksums of what is read alone.

        Raises:
            StoreNotFoundError: if it is not written yet.
            DamagedStoreError: if its table is damaged, or a file that it names is missing or of another size.
        """
        self.root, self.manifest, self.index, self._check = root, manifest, index, check
        self.path = root / "parts" / part_name(index)
        self._stamp = self._found_stamp()
        self.attributes = read_table(root, manifest, index, self.path)
        self._dtype, self._quantizer = dtype_of(manifest.dtype), LOSSY.get(manifest.codec)
        pages, files = self.attributes["num_rows"] // manifest.page_tokens, self.attributes["files"]
        self.pages = {
            name: PageReader(array, pages, check) for name, array in paged_arrays(manifest, self.path).items()
        }
        for name, reader in self.pages.items():
            shards = -(-pages // reader.array.pages_per_shard)
            if shards != sum(file.startswith(f"{name}/c/") for file in files):
                raise DamagedStoreError(f"{self.path}: {name} should have {shards} shards, the table names others")

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
        return [str(i) for i in self._array("sample_id", len(self), "T")]

    @cached_property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens per sample."""
        return self._array("length", len(self), "<i4")

    @cached_property
    def splits(self) -> np.ndarray[Any, Any]:
        """`Split` per sample."""
        return self._array("split", len(self), "|u1")

    @cached_property
    def starts(self) -> np.ndarray[Any, Any]:
        """First row per sample."""
        return self._array("start", len(self), "<i8")

    @property
    def order(self) -> list[int]:
        """Positions in the order in which they were written: read so, a part is read from front to back."""
        return [int(position) for position in np.lexsort((self.lengths, self.starts))]

    @cached_property
    def rows(self) -> dict[str, np.ndarray[Any, Any]]:
        """The per-token arrays of the whole part."""
        return {name: self._array(name, self.attributes["num_rows"], dtype) for name, dtype in ROW_ARRAYS.items()}

    @cached_property
    def per_sample(self) -> dict[str, np.ndarray[Any, Any]]:
        """The extra arrays of samples, of the whole part."""
        kinds = {name: kind for name, kind in self.manifest.extras.items() if kind.axis == "sample"}
        return {name: self._array(name, len(self), kind.numpy, kind.shape) for name, kind in kinds.items()}

    def sample(self, position: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """One sample; keys, values and extra arrays of rows are read and decoded only if asked for.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged.
        """
        if position in self.failed:
            raise SampleFailedError(f"{self.root}: sample {self.ids[position]!r} failed: {self.failed[position]}")
        start, length = int(self.starts[position]), int(self.lengths[position])
        if length < 1:
            raise DamagedStoreError(
                f"{self.path}: sample {self.ids[position]!r} has no rows and is not among the failed"
            )
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
        if self._stamp != self._found_stamp():
            raise StoreError(f"{self.path} was written again since it was opened; open the store again")
        page = self.manifest.page_tokens
        start, length = int(self.starts[position]), int(self.lengths[position])
        if start % page or min(start, length) < 0 or start + length > self.attributes["num_rows"]:
            raise DamagedStoreError(f"{self.path}: sample {self.ids[position]!r} has rows outside the part")
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

    def _array(self, name: str, rows: int, dtype: str, shape: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
        """A small array, whole; its files are compared with the table, so that its metadata cannot lie either."""
        import zarr

        folder = self.path / name
        try:
            for file, (_, checksum) in self.attributes["files"].items():
                if self._check and file.startswith(f"{name}/"):
                    with reading(self.path / file):
                        if file_crc32c(self.path / file) != checksum:
                            raise DamagedStoreError(f"{self.path}/{file}: checksum mismatch")
            found = np.asarray(zarr.open_array(folder, mode="r")[:])
        except StoreError:
            raise
        except Exception as error:  # Of Zarr's many, all mean that it could not make sense of the files.
            raise DamagedStoreError(f"{folder}: {error}") from error
        inner = found.shape[1:] if shape is None else shape
        if found.shape != (rows, *inner) or (dtype != "T" and found.dtype != np.dtype(dtype)):
            raise DamagedStoreError(f"{folder}: holds {found.dtype} {found.shape}, expected {dtype} ({rows}, ...)")
        return found

    def _found_stamp(self) -> tuple[int, ...]:
        try:
            return file_stamp(self.path / "zarr.json")
        except OSError:
            return ()
