"""Reads a part; nothing of it is read before its table was checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedStoreError, SampleFailedError, StoreError
from .dtypes import dtype_of
from .files import file_crc32c, reading
from .fingerprint import file_stamp
from .lock import at_work
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
        self._header = str(self.path / "zarr.json")
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

    @cached_property
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

    def sample(
        self,
        position: int,
        *,
        keys: bool = True,
        values: bool = True,
        extras: bool = True,
        layers: Sequence[int] | None = None,
    ) -> KVSample:
        """One sample; keys, values and extra arrays of rows are read and decoded only if asked for.

        Args:
            position: in this part.
            keys: whether to read the keys.
            values: whether to read the values.
            extras: whether to read extra arrays of rows.
            layers: which layers of keys and values to hand out, in this order; None for all.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged.
            StoreError: if it has no such layers.
        """
        length, start = self.tokens(position), int(self.starts[position])
        rows = {name: array[start : start + length] for name, array in self.rows.items()}
        kv = {
            name: self.read(name, position, layers) if wanted else None
            for name, wanted in zip(KV, (keys, values), strict=True)
        }
        return KVSample(
            sample_id=self.ids[position],
            split=Split(int(self.splits[position])),
            keys=None if kv["keys"] is None else self._dtype.to_torch(kv["keys"]),
            values=None if kv["values"] is None else self._dtype.to_torch(kv["values"]),
            extras=self._extras(position, rows=extras),
            **rows,
        )

    def tokens(self, position: int) -> int:
        """Tokens of a sample that has keys and values.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if it has none and was not.
        """
        if position in self.failed:
            raise SampleFailedError(f"{self.root}: sample {self.ids[position]!r} failed: {self.failed[position]}")
        if self.lengths[position] < 1:
            raise DamagedStoreError(
                f"{self.path}: sample {self.ids[position]!r} has no rows and is not among the failed"
            )
        return int(self.lengths[position])

    def read(self, name: str, position: int, layers: Sequence[int] | None = None) -> np.ndarray[Any, Any]:
        """`keys` or `values` of one sample as the on-disk array `[t, l, h, d]`, or an extra array of its rows."""
        _, length = self._place(position)
        entry, dtype = self._entry(name)
        layers = self._known(layers)
        out = np.empty((length, *(entry if layers is None else (len(layers), *entry[1:]))), dtype)
        self._fill(name, position, out, layers)
        return out

    def read_into(
        self, name: str, position: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None = None
    ) -> int:
        """Reads `keys` or `values` of one sample to the front of an array that is there already; no copy is made.

        A page is decoded whole, for so it was compressed and checksummed: `layers` spares the copying of the others,
        and of a lossy codec their dequantising. Beside `out`, each thread keeps a page and its chunk, and no more.

        Args:
            name: `keys` or `values`.
            position: in this part.
            out: `[>=t, l, h, d]` in the on-disk dtype (`DType.to_numpy` of a tensor shares its memory); fastest if
                C-contiguous. Rows behind the sample's end are left as they are.
            layers: which layers of the store `out` holds, in this order; None for all.

        Returns:
            The tokens of the sample.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged; `out` holds some of the rows then.
            StoreError: if `out` does not fit, there are no such layers, or the part was written again since.
        """
        length, layers = self.tokens(position), self._known(layers)
        (_, *inner), dtype = self._entry(name)
        entry = (self.manifest.geometry.num_layers if layers is None else len(layers), *inner)
        if out.dtype != np.dtype(dtype) or out.shape[1:] != entry or len(out) < length:
            raise StoreError(
                f"{self.path}: {name} of sample {self.ids[position]!r} are {dtype} {(length, *entry)}, "
                f"there is room for {out.dtype} {out.shape}"
            )
        self._fill(name, position, out[:length], layers)
        return length

    def _fill(self, name: str, position: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None) -> None:
        at_work()
        start, length = self._place(position)
        page = self.manifest.page_tokens
        if self._quantizer is None or name not in KV:
            self.pages[name].read_into(start // page, out, layers)
            return
        stored = {
            array: np.empty(self.pages[array].array.page_shape, self.pages[array].array.dtype)
            for array in self._quantizer.arrays(name, self.manifest.geometry.shape, page, self._dtype)
        }
        for number, first in enumerate(range(0, length, page)):
            if number:  # Only the first page of a sample has exact tokens.
                stored.pop(f"{name}_exact", None)
            for array, rows in stored.items():
                self.pages[array].read_into(start // page + number, rows)
            self._quantizer.decode_page(name, stored, out[first : first + page], page, self._dtype, layers)

    def _place(self, position: int) -> tuple[int, int]:
        """First row and number of rows of a sample."""
        if self._stamp != self._found_stamp():
            raise StoreError(f"{self.path} was written again since it was opened; open the store again")
        start, length = int(self.starts[position]), int(self.lengths[position])
        if start % self.manifest.page_tokens or min(start, length) < 0 or start + length > self.attributes["num_rows"]:
            raise DamagedStoreError(f"{self.path}: sample {self.ids[position]!r} has rows outside the part")
        return start, length

    def _entry(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape of a row of an array, and its on-disk dtype."""
        if name in KV:
            return self.manifest.geometry.shape, self._dtype.numpy
        return self.pages[name].array.page_shape[1:], self.pages[name].array.dtype

    def _known(self, layers: Sequence[int] | None) -> list[int] | None:
        if layers is None:
            return None
        found, there = [int(layer) for layer in layers], self.manifest.geometry.num_layers
        if not found or min(found) < 0 or max(found) >= there:
            raise StoreError(f"{self.root} has the layers 0 to {there - 1}, asked for {found}")
        return found

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
            return file_stamp(self._header)
        except OSError:
            return ()
