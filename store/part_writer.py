"""Writes a part: pages as samples come, small arrays and the table of files at the end, then one rename."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from ..errors import PartExistsError, StoreError
from .codec import Chunk
from .extras import checked_extras
from .files import disk_errors, file_table, fsync, fsync_tree, write_protect
from .fingerprint import digest_json
from .index import INDEX_FILE, KV, PartIndex, sample_table
from .lock import at_work
from .maker import hold, mark
from .manifest import Manifest
from .part import TOKEN_FIELDS, TOKENS, pack_tokens, paged_arrays, part_name
from .prepare import Prepared, prepare
from .sample import KVSample, Split
from .scratch import scratch
from .shard import PagedArray, PageWriter
from .table import read_header

_T = TypeVar("_T")
_AHEAD: Final = 16
"""Pages that are encoded, or wait to be, while one is written."""


class PartWriter:
    """Writes one part. Samples come in any order; `commit` makes the part visible, whole.

    Use as a context manager: leaving it without `commit` removes what was written.
    """

    def __init__(self, root: Path, manifest: Manifest, index: int, pool: ThreadPoolExecutor | None = None) -> None:
        """Begins part `index` of the store at `root`; its pages are encoded on the threads of `pool`, if there is one.

        What is written is the same, bit for bit. `append` returns when all of a sample is written: whose memory it was
        may use it again.
        """
        self.root, self.manifest, self.index, self._pool = root, manifest, index, pool
        self.samples = manifest.part_samples(index)
        self._flusher = ThreadPoolExecutor(2, "kava-fsync")
        self._flushes: list[Future[None]] = []
        self._folder = root / "parts" / f".tmp-{part_name(index)}-{mark()}"
        self._pages = {
            name: PageWriter(array, self._folder, self._flush) for name, array in paged_arrays(manifest).items()
        }
        self._start = np.zeros(len(self.samples), np.int64)
        self._length = np.full(len(self.samples), -1, np.int32)
        self._split = np.zeros(len(self.samples), np.uint8)
        self._ids: list[str] = [""] * len(self.samples)
        self._per_sample = {
            name: np.full((len(self.samples), *kind.shape), kind.fill_value, kind.numpy)
            for name, kind in manifest.extras.items()
            if kind.axis == "sample"
        }
        self._failed: dict[str, str] = {}
        layers = manifest.geometry.num_layers
        self._sums = {name: np.zeros((2, layers)) for name in KV}
        self._target_tokens = 0
        self._coverage: np.ndarray[Any, Any] | None = None
        self._arrays_begun = False
        self._held = hold(self._folder)
        try:
            with disk_errors(root):
                self._folder.mkdir(parents=True)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    def prepare(self, sample: KVSample) -> dict[str, Future[Prepared]]:
        """Begins what comes before the first byte of a sample is written, on the pool's threads if there are some.

        For `append`, which may be busy with another sample meanwhile. What is wrong with the sample is raised there.
        """
        return {name: self._submit(prepare, self.manifest, name, sample) for name in KV if len(sample)}

    def append(
        self,
        position: int,
        sample: KVSample,
        *,
        coverage: np.ndarray[Any, Any] | None = None,
        prepared: Mapping[str, Future[Prepared]] | None = None,
    ) -> None:
        """Writes a sample at `position` of this part.

        A sample with a non-finite key or value, or without tokens, is not written but recorded as failed.

        Args:
            position: in this part.
            sample: what to write.
            coverage: where time was resampled, `[segments, 3]`: text tokens, those with a target, those that end where
                a token of the parent ends.
            prepared: what `prepare` gave for this sample, if it was called before.

        Raises:
            StoreError: if shapes or extra arrays differ from the manifest, or the position is foreign or taken.
        """
        at_work()
        self._claim(position, sample.sample_id, sample.split)
        tokens, page = len(sample), self.manifest.page_tokens
        if not tokens:
            self._record(position, "no tokens")
            return
        extras = checked_extras(sample, self.manifest.extras)
        found = {name: ready.result() for name, ready in (prepared or self.prepare(sample)).items()}
        if reason := next((ready.reason for ready in found.values() if ready.reason), ""):
            self._record(position, reason)
            return
        arrays = {name: array for ready in found.values() for name, array in ready.arrays.items()}
        arrays |= {TOKENS: pack_tokens(sample)} | {name: a for name, a in extras.items() if name in self._pages}
        with disk_errors(self.root):
            self._start[position] = self._num_pages * page
            for writer, chunk in self._encoded(arrays):
                writer.write(chunk)
        for name, array in self._per_sample.items():
            array[position] = extras[name]
        self._length[position] = tokens
        self._target_tokens += int(sample.mask.sum())
        for name in KV:
            self._sums[name] += found[name].sums
        if coverage is not None:
            self._coverage = coverage + (0 if self._coverage is None else self._coverage)

    def fail(self, position: int, sample_id: str, split: Split, reason: str) -> None:
        """Records that this sample has no keys and values, and why."""
        self._claim(position, sample_id, split)
        self._record(position, reason)

    def commit(
        self,
        sources: dict[str, str] | None = None,
        *,
        written_by: str = "",
        coverage: list[list[int]] | None = None,
        content: str | None = None,
    ) -> Path:
        """Flushes the part and renames it into place.

        Args:
            sources: the digests of the parent parts this part was made from.
            written_by: what computed it, for provenance.
            coverage: of the whole part, where it was not given with the samples.
            content: the part whose numbers these are, of a store with the same fingerprint; see `PartReader.content`.

        Raises:
            StoreError: if a sample is missing.
            PartExistsError: if the part is there already, with other content.
        """
        if missing := np.flatnonzero(self._length < 0).tolist():
            raise StoreError(f"part {self.index}: samples at positions {missing[:5]} were not written")
        final = self.root / "parts" / part_name(self.index)
        self._arrays_begun = True
        with disk_errors(self.root):
            self._write_arrays()
            attributes = {
                "index": self.index,
                "store": self.manifest.fingerprint,
                "num_rows": self._num_pages * self.manifest.page_tokens,
                "target_tokens": self._target_tokens,
                "failed": self._failed,
                "sources": sources or {},
                "written_by": written_by,
                "coverage": coverage if self._coverage is None else self._coverage.tolist(),
                "files": file_table(self._folder, {p: f for w in self._pages.values() for p, f in w.files.items()}),
            }
            same = {name: value for name, value in attributes.items() if name != "written_by"}
            attributes["content"] = content or digest_json(same)
            attributes["digest"] = digest_json(attributes)
            header = {"zarr_format": 3, "node_type": "group", "attributes": {"kava_part": attributes}}
            (self._folder / "zarr.json").write_text(json.dumps(header, indent=1))
            write_protect(self._folder)
            for flush in self._flushes:
                flush.result()
            fsync_tree(self._folder)
            try:
                self._folder.rename(final)
            except OSError as error:
                # A file server renamed and its answer got lost, or the part was given out twice: the same bits.
                if _digest_of(final) == attributes["digest"]:
                    fsync(final.parent)
                    return final
                if os.path.lexists(final):
                    raise PartExistsError(f"{final} was written by another process meanwhile; it was kept") from error
                raise
            fsync(final.parent)
        self._arrays_begun = False
        return final

    def abort(self) -> None:
        """Removes what was not committed."""
        self._flusher.shutdown(wait=False, cancel_futures=True)
        for writer in self._pages.values():
            writer.abort()
        shutil.rmtree(self._folder, ignore_errors=True)
        gone = 0
        for _ in range(40 if self._arrays_begun else 0):  # After an error of one file, zarr may still be at others.
            time.sleep(0.05)
            gone = 0 if self._folder.exists() else gone + 1
            shutil.rmtree(self._folder, ignore_errors=True)
            if gone == 4:
                break
        self._held.release()

    def _claim(self, position: int, sample_id: str, split: Split) -> None:
        if not 0 <= position < len(self.samples):
            raise StoreError(f"part {self.index} has {len(self.samples)} samples, there is no position {position}")
        if self._length[position] >= 0:
            raise StoreError(f"part {self.index}: position {position} was written twice")
        self._ids[position], self._split[position] = sample_id, int(split)

    def _record(self, position: int, reason: str) -> None:
        self._failed[str(position)] = reason
        self._length[position] = 0
        self._start[position] = self._num_pages * self.manifest.page_tokens

    @property
    def _num_pages(self) -> int:
        """Pages written so far: the same number of every array."""
        return next(iter(self._pages.values())).num_pages

    def _submit(self, work: Callable[..., _T], *words: Any) -> Future[_T]:
        """On the pool, or at once where there is none."""
        if self._pool is not None:
            return self._pool.submit(work, *words)
        done: Future[_T] = Future()
        try:
            done.set_result(work(*words))
        except Exception as error:
            done.set_exception(error)
        return done

    def _flush(self, shard: Path) -> None:
        """Sends a shard that is whole on its way to the disk, while others are written."""
        self._flushes.append(self._flusher.submit(fsync, shard))

    def _encoded(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[tuple[PageWriter, Chunk]]:
        """The pages of these arrays, encoded, in order; on a pool no more than a few at once.

        One that is stored as it is may share its memory with the next.
        """
        waiting: deque[tuple[PageWriter, Future[Chunk]]] = deque()
        for name, writer in self._pages.items():
            rows, paged = arrays[name], writer.array
            fill = self.manifest.extras[name].fill_value if name in self.manifest.extras else 0
            for first in range(0, len(rows), paged.page_shape[0]):
                page = rows[first : first + paged.page_shape[0]]
                if self._pool is None or not paged.codec.compress:  # A checksum is found faster than a thread.
                    yield writer, _encode(paged, page, fill)
                    continue
                waiting.append((writer, self._pool.submit(_encode, paged, page, fill)))
                if len(waiting) > _AHEAD:
                    ready, chunk = waiting.popleft()
                    yield ready, chunk.result()
        for ready, chunk in waiting:
            yield ready, chunk.result()

    def _write_arrays(self) -> None:
        import zarr

        for writer in self._pages.values():
            writer.close()
        group = zarr.open_group(self._folder, mode="a", zarr_format=3)
        for name, writer in self._pages.items():
            paged = writer.array
            page, tail = paged.page_shape[0], paged.page_shape[1:]
            group.create_array(
                name,
                shape=(writer.num_pages * page, *tail),
                dtype=np.dtype(paged.dtype),
                chunks=paged.page_shape,
                shards=(page * paged.pages_per_shard, *tail),
                fill_value=paged.fill_value,
                compressors=paged.codec.zarr_codecs(np.dtype(paged.dtype).itemsize),
                attributes={"dtype": paged.meaning} | ({"fields": [*TOKEN_FIELDS]} if name == TOKENS else {}),
                dimension_names=paged.axes,
            )
        _small_array(group, "start", self._start, "sample")
        _small_array(group, "length", self._length, "sample")
        _small_array(group, "split", self._split, "sample")
        _small_array(group, "sample_id", np.array(self._ids, dtype=object), "sample")
        for name, array in self._per_sample.items():
            _small_array(group, name, array, *self.manifest.extras[name].dimension_names)
        index = PartIndex(
            *sample_table(self._start, self._length, self._split, self._ids),
            sums=np.stack([self._sums[name] for name in KV]),
            pages={name: writer.table for name, writer in self._pages.items()},
            extras=self._per_sample,
        )
        (self._folder / INDEX_FILE).write_bytes(index.save())


def _digest_of(part: Path) -> str | None:
    try:
        return str(read_header(part / "zarr.json")["kava_part"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encode(array: PagedArray, rows: np.ndarray[Any, Any], fill: float) -> Chunk:
    """A page, of which these rows are the first; until this thread's next one."""
    if len(rows) == array.page_shape[0]:
        return array.codec.encode(np.ascontiguousarray(rows))
    page = scratch("padded", array.page_bytes).view(array.dtype).reshape(array.page_shape)
    page[: len(rows)], page[len(rows) :] = rows, fill
    return array.codec.encode(page)


def _small_array(group: Any, name: str, data: np.ndarray[Any, Any], *axes: str) -> None:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    dtype = "str" if data.dtype == object else data.dtype
    chunks = tuple(max(1, size) for size in data.shape)
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=dtype,
        chunks=chunks,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=axes[: data.ndim],
        config={"write_empty_chunks": True},  # An absent chunk reads as zeros; here absent always means damaged.
    )
    if math.prod(data.shape):
        array[...] = data
