"""From a worker process to ours: rows of keys and values in shared memory, notes about them through a socket.

Each worker owns one ring of anonymous memory (a memfd, which has no name and dies with its processes) and tells our
process over a Unix socket what it has put there; see `local_socket` for who is listened to. Tensors are never pickled.
A full ring makes the worker wait, and so the engine: that is the bound on memory.
"""

from __future__ import annotations

import mmap
import os
import queue
import secrets
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError, reduction
from multiprocessing.connection import Connection
from typing import Any, Final

from ...errors import CaptureError
from .local_socket import connect, listen, wait_forever, welcome

CALL_SECONDS: Final = 120.0
"""Longest wait for the workers to call, once each has said that it is attached."""

_ALIGN: Final = 64


def leave_with(parent: int) -> None:
    """Makes this process, if it is another, end when the process `parent` does: an engine core would outlive it."""
    if parent == os.getpid():
        return
    handle = os.pidfd_open(parent)

    def watch() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGTERM)  # The engine stops its workers and frees its own shared memory.
        time.sleep(10)
        os._exit(1)

    threading.Thread(target=watch, name="kava-parent", daemon=True).start()


@dataclass(frozen=True)
class Rows:
    """Rows of one request in a `Piece`."""

    request: int
    first: int
    """Position of the first row in the request's prompt."""
    stop: int


@dataclass(frozen=True)
class Piece:
    """Keys and values `[2, layers, rows, kv_heads, head_dim]` of some layers and heads, for all requests of a step.

    Layers come first, so that the worker writes each in one run; our process has the time to turn them round.
    """

    call: int
    """Which call of `VLLMTeacher.capture` this belongs to."""
    layers: tuple[int, int]
    heads: tuple[int, int]
    rows: tuple[Rows, ...]
    """In the order in which they lie in the tensor."""

    @property
    def num_rows(self) -> int:
        """Rows in the tensor."""
        return sum(rows.stop - rows.first for rows in self.rows)

    def shape(self, head_dim: int) -> tuple[int, ...]:
        """Of the tensor."""
        layers, heads = (stop - first for first, stop in (self.layers, self.heads))
        return (2, layers, self.num_rows, heads, head_dim)


@dataclass(frozen=True)
class Hello:
    """The first note of a worker."""

    rank: int
    pid: int
    ring_bytes: int


@dataclass(frozen=True)
class Placed:
    """A piece lies in the ring at `offset`."""

    piece: Piece
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Lost:
    """Rows of a request can no longer be read."""

    call: int
    request: int
    reason: str


@dataclass(frozen=True)
class Flushed:
    """Nothing more comes for this call."""

    call: int


@dataclass(frozen=True)
class Address:
    """Where workers report; small enough for any engine's remote call."""

    name: str
    key: bytes


class Outbox:
    """The worker's end."""

    def __init__(self, address: Address, *, rank: int, ring_bytes: int) -> None:
        self._connection = connect(address.name, address.key)
        self._size, self._head = ring_bytes, 0
        self._taken: deque[int] = deque()  # Offsets of the pieces that were not emptied yet, oldest first.
        handle = os.memfd_create("kava-handover")
        os.truncate(handle, ring_bytes)
        self._memory = mmap.mmap(handle, ring_bytes)
        self._connection.send(Hello(rank, os.getpid(), ring_bytes))
        reduction.send_handle(self._connection, handle, None)
        os.close(handle)
        self._jobs: queue.SimpleQueue[tuple[Any, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="kava-outbox", daemon=True)
        self._thread.start()

    @property
    def memory(self) -> mmap.mmap:
        """The ring."""
        return self._memory

    def reserve(self, nbytes: int) -> int:
        """The offset of `nbytes` of the ring that are free now; waits for our process to empty some.

        Raises:
            EOFError: if our process is gone.
        """
        nbytes = -(-nbytes // _ALIGN) * _ALIGN
        assert nbytes <= self._size, "a piece is larger than the ring"
        while self._taken and self._connection.poll():  # Memory that was used a moment ago is the fastest.
            self._await_one()
        while (offset := self._room(nbytes)) is None:
            self._await_one()
        self._taken.append(offset)
        self._head = offset + nbytes
        return offset

    def _await_one(self) -> None:
        self._connection.recv_bytes()  # One byte for each piece that was emptied, in order.
        self._taken.popleft()

    def _room(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0
        tail = self._taken[0]
        if self._head > tail:
            if self._size - self._head >= nbytes:
                return self._head
            return 0 if tail >= nbytes else None
        return self._head if tail - self._head >= nbytes else None

    def send(self, note: Any, wait: Callable[[], object] = lambda: None) -> None:
        """Sends a note after `wait` returned: the copy that it tells of may still be under way."""
        self._jobs.put((note, wait))

    def close(self) -> None:
        """Sends what is queued, waits until it was read, and closes the socket."""
        self._jobs.put(None)
        self._thread.join()
        with suppress(EOFError, OSError):
            while self._taken:
                self._await_one()
        self._connection.close()

    def _send(self) -> None:
        with suppress(OSError):  # Our process is gone; `reserve` will say so.
            while (job := self._jobs.get()) is not None:
                note, wait = job
                wait()
                self._connection.send(note)


class Inbox:
    """Our end: one reading thread for each worker."""

    def __init__(self, on_note: Callable[[int, Any, memoryview | None], None]) -> None:
        """Listens.

        Args:
            on_note: called on a reading thread with the worker's rank, a note, and the bytes of a placed piece, which
                are the worker's again when it returns. A note of None says that the worker is gone.
        """
        self._on_note = on_note
        self._listening = listen()
        self.address = Address(self._listening.name, secrets.token_bytes(32))
        self.pids: dict[int, int] = {}
        self._sockets = [self._listening.socket]
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._start(self._accept, "kava-inbox")

    def wait(self, workers: int, *, seconds: float = CALL_SECONDS) -> None:
        """Return when this many workers have called; nobody else can call from then on.

        Raises:
            CaptureError: if they have not within `seconds`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.pids) >= workers, seconds):
                raise CaptureError(f"{len(self.pids)} of {workers} workers of the engine called within {seconds:g} s")
        self._listening.hide()

    def close(self) -> None:
        """Close every socket, which wakes whoever reads from one, there and here."""
        self._listening.hide()
        _shut(self._listening.socket)
        self._threads[0].join()  # The accepting one: no socket and no thread is added after it.
        with self._changed:
            sockets = list(self._sockets)
        for opened in sockets:
            _shut(opened)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for opened in sockets:
            opened.close()

    def _start(self, target: Callable[..., None], name: str, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # The socket was closed.
            while True:
                opened, _ = self._listening.socket.accept()
                with self._changed:
                    self._sockets.append(opened)
                # On a thread of its own: who is silent keeps nobody else waiting.
                self._start(self._greet, "kava-inbox-caller", opened)

    def _greet(self, opened: socket.socket) -> None:
        """Listen to a caller that proves to be a worker; hang up on any other."""
        try:
            connection = welcome(opened, self.address.key)
        except (AuthenticationError, EOFError, OSError):
            self._forget(opened)
            return
        try:
            hello: Hello = connection.recv()
            handle = reduction.recv_handle(connection)
            wait_forever(opened)
        except (EOFError, OSError):
            connection.close()
            self._forget(opened)
            return
        memory = mmap.mmap(handle, hello.ring_bytes)
        os.close(handle)
        with self._changed:
            self.pids[hello.rank] = hello.pid
            self._changed.notify_all()
        self._read(hello.rank, connection, memory)

    def _forget(self, opened: socket.socket) -> None:
        with self._changed:
            self._sockets.remove(opened)
        opened.close()

    def _read(self, rank: int, connection: Connection[Any, Any], memory: mmap.mmap) -> None:
        with connection, suppress(EOFError, OSError):
            while True:
                note = connection.recv()
                if isinstance(note, Placed):
                    with memoryview(memory) as view, view[note.offset : note.offset + note.nbytes] as cut:
                        self._on_note(rank, note.piece, cut)
                    connection.send_bytes(b"\0")
                else:
                    self._on_note(rank, note, None)
        self._on_note(rank, None, None)


def _shut(opened: socket.socket) -> None:
    """Wake whoever reads from a socket or waits for a caller."""
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
