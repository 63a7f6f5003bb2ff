"""Reader of a part; no sample is read before table and index were checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import DamagedStoreError, SampleFailedError, StoreError
from .dtypes import dtype_of
from .fingerprint import file_stamp
from .index import INDEX_FILE, KV, PartIndex
from .lock import at_work
from .part import SEGMENT_FIELD, TOKENS, PartLayout, part_name, unpack_tokens
from .quantize import LOSSY
from .sample import KVSample, Segment, Split
from .shard import PageReader
from .table import check_files, read_index, read_table

_OVERHEAD: Final = 16 << 10
"""Bytes of an open part beyond its index: its table and Python objects."""


class PartReader:
    """Reader of one committed part.

    Opening reads two small files, the table and the index: where each sample is, and which checksums its chunks must
    have. The arrays that other Zarr readers use (`start`, `length`, `split`, `sample_id` and extra arrays of
    samples) are not read: `verify` compares them with the index.
    """

    def __init__(self, root: Path, layout: PartLayout, index: int, *, check: bool = True) -> None:
        """Open a part.

        Args:
            root: path of the store.
            layout: layout of the store's parts.
            index: number of the part.
            check: compare each chunk with its checksum when it is read; table and index are compared in any case.

        Raises:
            StoreNotFoundError: if the part has not been written.
            DamagedStoreError: if its table or its index is damaged. Other files are checked when they are read, or by
                `check_files`.
        """
        manifest = layout.manifest
        self.root, self.manifest, self.index, self._check = root, manifest, index, check
        self._folder = f"{root}/parts/{part_name(index)}"
        self._header = f"{self._folder}/zarr.json"
        self.table, data = self._read(layout)
        self._dtype, self._quantizer = dtype_of(manifest.dtype), LOSSY.get(manifest.codec)
        try:
            self._index = PartIndex.load(data, manifest, len(self), layout.arrays)
            if self._index.num_pages * manifest.page_tokens != self.num_rows:
                raise ValueError(f"{self._index.num_pages} pages for {self.num_rows} rows")
        except (ValueError, OverflowError) as error:
            raise DamagedStoreError(f"{self._folder}/{INDEX_FILE}: {error}") from None
        tables, files = self._index.pages, self.table["files"]
        self.pages = {n: PageReader(a, self._folder, tables[n], files, check) for n, a in layout.arrays.items()}
        self.nbytes = len(data) + sum(reader.offsets_nbytes for reader in self.pages.values()) + _OVERHEAD
        """Approximate memory of this reader in bytes, once all its arrays have been read."""

    def _read(self, layout: PartLayout) -> tuple[dict[str, Any], bytes]:
        """Return table and index of one state of the part, which another process may replace in between."""
        while True:
            self._stamp = self._current_stamp()
            try:
                table = read_table(self.root, layout, self.index)
                return table, read_index(self._folder, table)
            except DamagedStoreError:
                if self._current_stamp() == self._stamp:
                    raise

    @property
    def path(self) -> Path:
        """Folder of the part."""
        return Path(self._folder)

    def __len__(self) -> int:
        return len(self.manifest.part_samples(self.index))

    def check_files(self) -> None:
        """Check that every file of the part exists with its size; its content is compared when it is read.

        Raises:
            DamagedStoreError: naming the first file that does not.
        """
        check_files(self._folder, self.table["files"])

    @property
    def digest(self) -> str:
        """Digest of the content: of the table, which has the hash of every file."""
        return str(self.table["digest"])

    @property
    def content(self) -> str:
        """Digest by which derived parts remember this one: provenance does not count; after transcoding the original's.

        Two parts of stores with equal fingerprints and equal `content` hold the same numbers.
        """
        return str(self.table["content"])

    @property
    def num_rows(self) -> int:
        """Rows of the token axis, page padding included."""
        return int(self.table["num_rows"])

    @property
    def sources(self) -> dict[str, str]:
        """Digests of the parent parts, as their `content` says."""
        return dict(self.table["sources"])

    @property
    def written_by(self) -> str:
        """Program that computed the part: a capture's backend and its version."""
        return str(self.table.get("written_by", ""))

    @property
    def target_tokens(self) -> int:
        """Tokens that have a target."""
        return int(self.table["target_tokens"])

    @property
    def sums(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """`keys` and `values`: per layer `[2, l]` float64, the sum of their numbers and of the squares."""
        return dict(zip(KV, self._index.sums, strict=True))

    @property
    def coverage(self) -> list[list[int]] | None:
        """Per segment: text tokens, those with a target, those that end with a parent's token; if resampled."""
        coverage: list[list[int]] | None = self.table.get("coverage")
        return coverage

    @cached_property
    def failed(self) -> dict[int, str]:
        """Positions of failed samples, with the reason."""
        return {int(position): reason for position, reason in self.table["failed"].items()}

    @property
    def ids(self) -> list[str]:
        """Sample ids."""
        with self._text():
            return self._index.ids

    def sample_id(self, position: int) -> str:
        """Return the id of one sample."""
        with self._text():
            return self._index.sample_id(position)

    @contextmanager
    def _text(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise DamagedStoreError(f"{self._folder}/{INDEX_FILE}: a sample id is not text: {error}") from None

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens per sample `[samples]` int64; 0 if it failed."""
        return self._index.lengths

    @property
    def splits(self) -> np.ndarray[Any, Any]:
        """`Split` per sample `[samples]` int64."""
        return self._index.splits

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        """First row per sample `[samples]` int64."""
        return self._index.starts

    @property
    def order(self) -> list[int]:
        """Positions in the order in which they were written: read so, a part is read from front to back."""
        return [int(position) for position in np.lexsort((self.lengths, self.starts))]

    @property
    def per_sample(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Extra arrays of samples, of the whole part."""
        return self._index.extras

    @property
    def part_index(self) -> PartIndex:
        """The index itself."""
        return self._index

    def tokens_by_segment(self) -> np.ndarray[Any, Any]:
        """Return the number of tokens `[segments]` int64 of each `Segment`, page padding left out."""
        counts = np.zeros(len(Segment), np.int64)
        for position in self.order:
            if self.lengths[position]:
                counts += np.bincount(self.read(TOKENS, position)[:, SEGMENT_FIELD], minlength=len(Segment))
        return counts

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
        self.tokens(position)
        kv = {
            name: self.read(name, position, layers) if wanted else None
            for name, wanted in zip(KV, (keys, values), strict=True)
        }
        return KVSample(
            sample_id=self.sample_id(position),
            split=Split(int(self.splits[position])),
            keys=None if kv["keys"] is None else self._dtype.to_torch(kv["keys"]),
            values=None if kv["values"] is None else self._dtype.to_torch(kv["values"]),
            extras=self._extras(position, rows=extras),
            **unpack_tokens(self.read(TOKENS, position)),
        )

    def tokens(self, position: int) -> int:
        """Tokens of a sample that has keys and values.

        Raises:
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if it has none and was not.
        """
        if position in self.failed:
            raise SampleFailedError(f"{self.root}: sample {self.sample_id(position)!r} failed: {self.failed[position]}")
        if self.lengths[position] < 1:
            raise DamagedStoreError(
                f"{self.path}: sample {self.sample_id(position)!r} has no rows and is not among the failed"
            )
        return int(self.lengths[position])

    def read(self, name: str, position: int, layers: Sequence[int] | None = None) -> np.ndarray[Any, Any]:
        """`keys` or `values` of one sample as the on-disk array `[t, l, h, d]`, or an extra array of its rows."""
        _, length = self._place(position)
        entry, dtype = self._entry(name)
        layers = self._known(layers)
        out = np.empty((length, *(entry if layers is None else (len(layers), *entry[1:]))), dtype)
        self._read_rows(name, position, out, layers)
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
                f"{self.path}: {name} of sample {self.sample_id(position)!r} are {dtype} {(length, *entry)}, "
                f"there is room for {out.dtype} {out.shape}"
            )
        self._read_rows(name, position, out[:length], layers)
        return length

    def _read_rows(self, name: str, position: int, out: np.ndarray[Any, Any], layers: Sequence[int] | None) -> None:
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
        """Return first row and number of rows of a sample."""
        if self._stamp != self._current_stamp():
            raise StoreError(f"{self.path} was written again since it was opened; open the store again")
        start, length = int(self.starts[position]), int(self.lengths[position])
        if start % self.manifest.page_tokens or start + length > self.num_rows:
            raise DamagedStoreError(f"{self._folder}: sample {self.sample_id(position)!r} has rows outside the part")
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

    def _current_stamp(self) -> tuple[int, ...]:
        try:
            return file_stamp(self._header)
        except OSError:
            return ()
