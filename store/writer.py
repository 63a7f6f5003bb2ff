"""Encoding and writing on threads of their own, so that the next forward pass does not wait for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import SampleFailedError
from .cpus import num_cpus
from .part_writer import PartWriter
from .sample import KVSample, Split

if TYPE_CHECKING:
    from .store import KVStore

Derive = Callable[[KVSample], tuple[KVSample, np.ndarray[Any, Any]]]
"""Makes what is written, and its coverage, of what was appended."""
QUEUE_BYTES: Final = 512 << 20
"""Raw bytes that may wait to be written before `append` blocks."""
_OVERHEAD: Final = 4096
"""Bytes of a waiting sample in addition to its keys and values: tokens, extra arrays, objects."""
ENCODERS: Final = min(8, num_cpus())
"""Threads that encode."""


@dataclass
class BackgroundWriter:
    """Writes parts in the order in which they are begun; an error of the thread is raised by the next call.

    Use as a context manager: leaving it waits until all that was queued is written, after an exception too. Parts that
    were committed are kept, the one in hand is dropped.
    """

    store: KVStore
    on_commit: Callable[[int], None] = lambda part: None
    """Called on the writing thread with the number of each committed part."""
    derive: Derive | None = None
    """Turns samples into those of another store, on the writing thread; it may raise `SampleFailedError`."""
    queue_bytes: int = QUEUE_BYTES
    encoders: int = ENCODERS
    """Threads that encode beside the one that writes; 0 for that one alone. What is written is the same."""
    _jobs: deque[tuple[Callable[[], None], int]] = field(default_factory=deque)
    _pending: int = 0
    _closing: bool = False
    _error: BaseException | None = None
    _part: PartWriter | None = None
    _unfinished: Callable[[], None] | None = None

    def __enter__(self) -> BackgroundWriter:
        self._pool = ThreadPoolExecutor(self.encoders, "kava-encoder") if self.encoders else None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kava-writer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._part is not None:
            self._part.abort()
        if self._pool is not None:
            self._pool.shutdown()
        if exc_type is None:
            self._raise()

    def begin(self, part: int) -> None:
        """Starts a part."""

        def job() -> None:
            self._part = self.store.write_part(part, self._pool)

        self._put(job)

    def append(self, position: int, sample: KVSample, *, coverage: np.ndarray[Any, Any] | None = None) -> None:
        """Queues a sample of the current part; blocks while too much is waiting. See `PartWriter.append`."""
        size = _OVERHEAD + sum(t.numel() * t.element_size() for t in (sample.keys, sample.values) if t is not None)
        self._put(lambda: self._append(position, sample, coverage), size)

    def fail(self, position: int, sample_id: str, split: Split, reason: str) -> None:
        """Queues the record of a failed sample."""
        self._put(lambda: self._fail(position, sample_id, split, reason))

    def commit(
        self,
        sources: dict[str, str] | None = None,
        *,
        written_by: str = "",
        coverage: list[list[int]] | None = None,
    ) -> None:
        """Queues the commit of the current part; see `PartWriter.commit`."""

        def job() -> None:
            self._finish()
            with self._current as part:  # Of a part that was there already, what was written again goes.
                part.commit(sources, written_by=written_by, coverage=coverage)
            self._part = None
            self.on_commit(part.index)

        self._put(job)

    def _append(self, position: int, sample: KVSample, coverage: np.ndarray[Any, Any] | None) -> None:
        if self.derive is not None:
            try:
                sample, coverage = self.derive(sample)
            except SampleFailedError as error:
                self._fail(position, sample.sample_id, sample.split, str(error))
                return
        prepared = self._current.prepare(sample)
        self._finish()  # The one before, while this one is prepared.
        self._unfinished = partial(self._current.append, position, sample, coverage=coverage, prepared=prepared)

    def _fail(self, position: int, sample_id: str, split: Split, reason: str) -> None:
        self._finish()
        self._current.fail(position, sample_id, split, reason)

    def _finish(self) -> None:
        """Writes the sample that was only prepared yet, if there is one."""
        work, self._unfinished = self._unfinished, None
        if work is not None:
            work()

    @property
    def _current(self) -> PartWriter:
        assert self._part is not None, "begin() was not called"
        return self._part

    def _put(self, job: Callable[[], None], size: int = 0) -> None:
        with self._changed:
            # A sample larger than the whole queue passes when nothing else is waiting.
            while self._error is None and self._pending and self._pending + size > self.queue_bytes:
                self._changed.wait()
            self._raise()
            self._jobs.append((job, size))
            self._pending += size
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closing:
                    self._changed.wait()
                ending = not self._jobs
                job, size = (self._finish, 0) if ending else self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # Handed to the caller's thread by _raise.
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            if ending:
                return
            del job
            with self._changed:
                self._pending -= size
                self._changed.notify_all()
