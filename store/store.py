"""`KVStore`: open or create a store, read samples, batches and dask arrays, write parts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ManifestMismatchError, StoreError, StoreNotFoundError
from .blocks import dask_array
from .dtypes import DType, dtype_of
from .files import disk_errors, make_folder, reading, refuse_url, remove, size_of, write_atomic
from .fingerprint import digest_json
from .geometry import KVGeometry
from .leftovers import remove_leftovers
from .lock import Lock
from .manifest import Manifest
from .open_parts import OpenParts
from .part import PartLayout, part_name
from .part_reader import PartReader
from .part_writer import PartWriter
from .sample import SEGMENTS, KVBatch, KVSample, Split, collate
from .table import header_bytes, read_header

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    import dask.array as da

    from .verify import Damage

_ASIDE: Final = ".aside-"
OUTDATED: Final = ".outdated-"
"""Prefix of a part that is hidden until it is written again; see `part_exchange`."""
_CLAIM: Final = ".claim-"


class KVStore(Sequence[KVSample]):
    """A store of keys and values. `store[i]` is the i-th sample of the corpus."""

    def __init__(self, path: Path, manifest: Manifest, *, check: bool = True) -> None:
        self.path, self.manifest, self.check = path, manifest, check
        self._parts = OpenParts()

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> KVStore:
        """Opens a store for reading.

        Args:
            path: of the store.
            check: whether to compare what is read with its checksums. Without, damage may be read as numbers: for a
                store that was just verified, or on a file system that checks by itself.

        Raises:
            StoreNotFoundError: if there is none.
            StoreError: if it is not a kava store of a known format.
        """
        refuse_url(path)
        path = Path(path)
        header = path / "zarr.json"
        try:
            with reading(header):
                attributes = read_header(header)
        except FileNotFoundError:
            raise StoreNotFoundError(f"there is no store at {path}") from None
        except NotADirectoryError:
            raise StoreError(f"{path} is a file, not a store. Name the store's folder") from None
        except StoreError:
            raise
        except ValueError as error:
            raise StoreError(f"{header} is not readable: {error}") from None
        return cls(path, Manifest.from_attributes(attributes, str(path)), check=check)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> KVStore:
        """Creates a store, or opens the one at `path` to continue it.

        Raises:
            ManifestMismatchError: if the one at `path` has another manifest, naming every differing field.
        """
        refuse_url(path)
        path = Path(path)
        if (path / "zarr.json").exists():
            store = cls.open(path)
            if found := store.manifest.differences(manifest):
                fields = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in found.items())
                raise ManifestMismatchError(
                    f"{path} holds other content ({fields}). Replace it with --force, or choose another run_dir"
                )
            remove_leftovers(path)
            store.remove_set_aside()
            return store
        with disk_errors(path):
            make_folder(path / "parts")
        for folder in (path / "parts", path):
            attributes = manifest.to_attributes() if folder == path else {}
            write_atomic(folder / "zarr.json", header_bytes(attributes))
        return cls(path, manifest)

    def __repr__(self) -> str:
        m = self.manifest
        return f"KVStore({str(self.path)!r}, {m.kind}, {len(self)} samples, {m.geometry}, {m.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it opens parts itself."""
        return {"path": self.path, "manifest": self.manifest, "check": self.check, "_parts": OpenParts()}

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> KVSample:  # type: ignore[override]
        return self.sample(index)

    def __iter__(self) -> Iterator[KVSample]:
        return (self.sample(i) for i in range(len(self)))

    @cached_property
    def layout(self) -> PartLayout:
        """Layout of the parts.

        Raises:
            StoreError: if the codec is unknown.
        """
        return PartLayout.of(self.manifest)

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width."""
        return self.manifest.geometry

    @property
    def dtype(self) -> DType:
        """Storage dtype."""
        return dtype_of(self.manifest.dtype)

    def sample(
        self,
        index: int,
        *,
        keys: bool = True,
        values: bool = True,
        extras: bool = True,
        layers: Sequence[int] | None = None,
    ) -> KVSample:
        """Sample `index`; keys, values and extra arrays are read only if asked for.

        Args:
            index: of the sample.
            keys: whether to read the keys.
            values: whether to read the values.
            extras: whether to read extra arrays of rows.
            layers: which layers of keys and values to hand out, in this order; None for all. A page holds all layers
                and is read and decoded whole, so this saves memory and copying, not reading.

        Raises:
            IndexError: if there is no such sample.
            StoreNotFoundError: if its part is not written yet.
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged.
            StoreError: if there are no such layers.
        """
        part, position = self._where(index)
        return part.sample(position, keys=keys, values=values, extras=extras, layers=layers)

    def read_into(
        self,
        index: int,
        *,
        keys: np.ndarray[Any, Any] | None = None,
        values: np.ndarray[Any, Any] | None = None,
        layers: Sequence[int] | None = None,
    ) -> int:
        """Reads sample `index` into arrays that are there already, which may be used again for the next.

        Several threads may read at once, of one store; each needs arrays of its own.

        Args:
            index: of the sample.
            keys: `[>=t, l, h, d]` in the on-disk dtype, for the keys; None not to read them. `store.dtype.to_numpy` of
                a contiguous tensor of the store's dtype shares its memory. Fastest if C-contiguous; rows behind the
                sample's end are left as they are.
            values: the same for the values.
            layers: which layers of the store the arrays hold, in this order; None for all. See `sample`.

        Returns:
            `t`, the tokens of the sample.

        Raises:
            IndexError: if there is no such sample.
            StoreNotFoundError: if its part is not written yet.
            SampleFailedError: if it was recorded as failed.
            DamagedStoreError: if its bytes are damaged; the arrays hold some of the rows then.
            StoreError: if an array does not fit, or there are no such layers.
        """
        part, position = self._where(index)
        for name, out in (("keys", keys), ("values", values)):
            if out is not None:
                part.read_into(name, position, out, layers)
        return part.tokens(position)

    def _where(self, index: int) -> tuple[PartReader, int]:
        part, position = self.manifest.place(index)
        return self.part(part), position

    def batch(
        self,
        indices: Iterable[int],
        *,
        keys: bool = True,
        values: bool = True,
        layers: Sequence[int] | None = None,
        pad_token_id: int = 0,
    ) -> KVBatch:
        """Several samples, padded on the right; see `sample`."""
        samples = [self.sample(i, keys=keys, values=values, extras=False, layers=layers) for i in indices]
        return collate(samples, pad_token_id=pad_token_id)

    def per_sample(self, name: str) -> np.ndarray[Any, Any]:
        """`[num_samples, ...]`: an extra array of samples; NaN (-1 for int32) where one failed or is not written yet.

        Raises:
            StoreError: if the manifest declares none of this name.
        """
        kind = self.manifest.extras.get(name)
        if kind is None or kind.axis != "sample":
            known = [n for n, k in self.manifest.extras.items() if k.axis == "sample"]
            raise StoreError(
                f"{self.path}: no number {name!r} is kept for samples; there is {', '.join(known) or 'none'}"
            )
        out = np.full((len(self), *kind.shape), kind.fill_value, kind.dtype)
        for number in self.committed_parts():
            samples = self.manifest.part_samples(number)
            out[samples.start : samples.stop] = self.part(number).per_sample[name]
        return out

    @property
    def keys(self) -> da.Array:
        """`[all tokens, l, h, d]`: the pre-RoPE keys of every written sample, in sample order, without padding."""
        return dask_array(self, "keys")

    @property
    def values(self) -> da.Array:
        """`[all tokens, l, h, d]`: the values of every written sample, in sample order, without padding."""
        return dask_array(self, "values")

    def part(self, index: int) -> PartReader:
        """Return the reader of a part; those used last are kept open.

        Raises:
            StoreNotFoundError: if the part has not been written.
            DamagedStoreError: if its table or its index is damaged.
        """
        return self._parts.get(index, lambda: PartReader(self.path, self.layout, index, check=self.check))

    def check_files(self) -> None:
        """Check that every file of every written part exists with its size, without reading it.

        Raises:
            DamagedStoreError: naming the first part that is damaged.
        """
        for part in self._there():
            part.check_files()

    def committed_parts(self) -> list[int]:
        """Numbers of the parts that are written; what lies in a part's place and is none counts, as a damaged one."""
        return self.parts_named("")

    def parts_set_aside(self) -> list[int]:
        """Numbers of the parts that were taken out and not written again yet."""
        return self.parts_named(_ASIDE)

    def parts_named(self, prefix: str) -> list[int]:
        """Return the numbers of parts that lie under a name with this prefix."""
        folder = self.path / "parts"
        try:
            with reading(folder):
                entries = [entry.name for entry in folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        names = (name.removeprefix(prefix) for name in entries if name.startswith(prefix))
        found = sorted(int(name) for name in names if re.fullmatch(r"[0-9]+", name) and name == part_name(int(name)))
        return [index for index in found if index < self.manifest.num_parts]

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not written yet."""
        done = set(self.committed_parts())
        return [index for index in range(self.manifest.num_parts) if index not in done]

    def write_part(self, index: int, pool: ThreadPoolExecutor | None = None) -> PartWriter:
        """A writer for one part, that encodes on the threads of `pool`, if there is one."""
        return PartWriter(self.path, self.manifest, index, pool)

    def claim(self, index: int, *, wait: bool = False) -> Lock | None:
        """Says that this process is at a part; None if another is, and `wait` is not set.

        Whoever holds the claim looks whether the part is there by now. It saves work, no more: see `Lock`.

        Raises:
            StoreNotFoundError: if the store was moved to another place meanwhile, as a rebuild is that is complete.
        """
        return Lock.take(self.path / "parts" / f"{_CLAIM}{part_name(index)}", wait=wait, create=False)

    def holds(self, index: int) -> bool:
        """Whether a part is written."""
        return os.path.lexists(self.path / "parts" / part_name(index))

    def drop_part(self, index: int) -> None:
        """Removes a part, so that it is written again; derived parts notice by its digest."""
        self._parts.forget(index)
        with disk_errors(self.path):
            doomed = self.path / "parts" / f".drop-{part_name(index)}"
            remove(doomed)
            (self.path / "parts" / part_name(index)).rename(doomed)
            remove(doomed)

    def forget(self, index: int) -> None:
        """Close the reader of a part, which another one replaces."""
        self._parts.forget(index)

    def set_aside(self, index: int) -> None:
        """Takes a part out, but keeps it under a hidden name until it is written again: see `remove_set_aside`."""
        self.forget(index)
        with disk_errors(self.path):
            hidden = self.path / "parts" / f"{_ASIDE}{part_name(index)}"
            remove(hidden)
            (self.path / "parts" / part_name(index)).rename(hidden)

    def remove_set_aside(self) -> None:
        """Remove parts that were set aside or hidden and are written again."""
        with disk_errors(self.path):
            for prefix in (_ASIDE, OUTDATED):
                for index in set(self.parts_named(prefix)) & set(self.committed_parts()):
                    remove(self.path / "parts" / f"{prefix}{part_name(index)}")

    def indices(self, split: Split | None = None) -> list[int]:
        """Return the samples that are written and did not fail, of one split or of all."""
        indices: list[int] = []
        for number in self.committed_parts():
            part = self.part(number)
            good = np.ones(len(part), np.bool_) if split is None else part.splits == int(split)
            good[list(part.failed)] = False
            indices += (np.flatnonzero(good) + self.manifest.part_samples(number).start).tolist()
        return indices

    def indices_of(self, sample_ids: Collection[str]) -> dict[str, int]:
        """Return the index of each of these samples by its id; ids that no written part has are left out."""
        wanted, indices = frozenset(sample_ids), {}
        for number in self.committed_parts():
            samples = self.manifest.part_samples(number)
            for position, sample_id in enumerate(self.part(number).ids):
                if sample_id in wanted:
                    indices[sample_id] = samples[position]
            if len(indices) == len(wanted):
                break
        return indices

    @property
    def written_by(self) -> dict[str, int]:
        """What computed the parts, with the number of parts of each; parts made from another store do not say."""
        return dict(Counter(part.written_by for part in self._there() if part.written_by))

    @property
    def failed(self) -> dict[str, str]:
        """Ids of failed samples, with the reason."""
        return {part.sample_id(position): reason for part in self._there() for position, reason in part.failed.items()}

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of every sample `[num_samples]`; 0 where it is not written yet."""
        out = np.zeros(len(self), np.int64)
        for number in self.committed_parts():
            samples = self.manifest.part_samples(number)
            out[samples.start : samples.stop] = self.part(number).lengths
        return out

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(int(part.lengths.sum()) for part in self._there())

    @property
    def content(self) -> str:
        """A digest of the numbers of every part that is written; that of a lossless copy is the same."""
        return digest_json([(number, self.part(number).content) for number in self.committed_parts()])

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Per layer, over all tokens with a target: `keys_mean`, `keys_std`, `values_mean`, `values_std`, each `[l]`.

        Read from the parts' indices; no tensor is touched.
        """
        names = ("keys", "values")
        totals = {name: np.zeros((2, self.geometry.num_layers)) for name in names}
        tokens = 0
        for part in map(self.part, self.committed_parts()):
            tokens += part.target_tokens
            for name in names:
                totals[name] += part.sums[name]
        count = float(tokens * self.geometry.width)
        out: dict[str, np.ndarray[Any, Any]] = {}
        for name in names:
            with np.errstate(over="ignore", invalid="ignore"):  # A store from elsewhere may hold any numbers.
                mean, square = totals[name] / max(count, 1)
                out[f"{name}_mean"] = mean
                out[f"{name}_std"] = np.sqrt(np.maximum(square - mean**2, 0))
        return out

    def coverage(self) -> dict[str, tuple[int, int, int]]:
        """How well this time axis meets its parent's, by segment; empty unless time was resampled.

        Text tokens; those with a target; those that end where a token of the parent ends.
        """
        found = [coverage for part in self._there() if (coverage := part.coverage) is not None]
        if not found:
            return {}
        totals = np.sum(found, axis=0).tolist()
        return {name: tuple(totals[segment]) for name, segment in SEGMENTS.items() if totals[segment][0]}

    def verify(self) -> list[Damage]:
        """Checks every byte of every written part; an empty list means that all is as it was written."""
        from .verify import verify_store

        return verify_store(self)

    def size_on_disk(self) -> int:
        """Bytes of all files, but for what is being written or removed just now."""
        return size_of(self.path)

    def _there(self) -> Iterator[PartReader]:
        """The readers of all parts; one that another process takes out meanwhile is left out."""
        for number in self.committed_parts():
            try:
                part = self.part(number)
            except StoreNotFoundError:
                continue
            yield part
