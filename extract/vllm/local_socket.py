"""A Unix socket between processes of one user: nobody else can reach it, and nobody can make either side wait.

The socket lies in a folder that only its owner may enter. Each side asks the kernel who the other one is before it
reads a byte, then both prove that they know the same key, within a time limit: notes are pickled, so only a process
that could run code as this user anyway is listened to.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Final

HANDSHAKE_SECONDS: Final = 20.0
"""Longest silence of a peer until it has proved that it knows the key."""

_LONGEST_NAME: Final = 107
"""Bytes of a Unix socket's path."""


@dataclass(frozen=True)
class Listening:
    """A listening socket and the folder it lies in."""

    socket: socket.socket
    folder: Path

    @property
    def name(self) -> str:
        """The path that peers connect to."""
        return str(self.folder / "socket")

    def hide(self) -> None:
        """Remove the folder: who is connected stays so, nobody else can connect any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def listen() -> Listening:
    """Listen on a socket in a new folder that only this user may enter.

    Raises:
        OSError: if no folder for temporary files can be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="kava-"))
    if len(os.fsencode(folder / "socket")) > _LONGEST_NAME:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="kava-", dir="/tmp"))
    listening = Listening(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), folder)
    try:
        listening.socket.bind(listening.name)
        listening.socket.listen()
    except BaseException:
        listening.socket.close()
        listening.hide()
        raise
    return listening


def connect(name: str, key: bytes, *, seconds: float = HANDSHAKE_SECONDS) -> Connection[Any, Any]:
    """Connect to the socket at `name`, whose owner must be this user and know the key.

    Raises:
        AuthenticationError: if it is another user's, or does not know the key.
        TimeoutError: if it is silent for longer than `seconds`.
        OSError: if nobody listens there.
    """
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _limit(opened, seconds)
        opened.connect(name)
        check_peer(opened)
        connection: Connection[Any, Any] = Connection(os.dup(opened.fileno()))
        try:
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
        except BaseException:
            connection.close()
            raise
        _limit(opened, 0)
    except BlockingIOError:  # What the kernel says when the limit of a blocking socket has passed.
        raise TimeoutError(f"{name}: kava's process did not answer within {seconds:g} s") from None
    finally:
        opened.close()
    return connection


def welcome(opened: socket.socket, key: bytes, *, seconds: float = HANDSHAKE_SECONDS) -> Connection[Any, Any]:
    """Return the connection of a caller that is this user and knows the key; call `wait_forever` after its first note.

    Raises:
        AuthenticationError: if it is another user's, or does not know the key.
        OSError: if it is silent for longer than `seconds`, or gone.
    """
    check_peer(opened)
    _limit(opened, seconds)
    connection: Connection[Any, Any] = Connection(os.dup(opened.fileno()))
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    except BaseException:
        connection.close()
        raise
    return connection


def wait_forever(opened: socket.socket) -> None:
    """Lift the time limit of a connection: from here on, both sides may be busy for long."""
    _limit(opened, 0)


def check_peer(opened: socket.socket) -> None:
    """Check that the other end belongs to this user, as the kernel knows it.

    Raises:
        AuthenticationError: if it does not.
    """
    data = opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", data)
    if uid != os.geteuid():
        raise AuthenticationError(f"process {pid} belongs to user {uid}, expected {os.geteuid()}")


def _limit(opened: socket.socket, seconds: float) -> None:
    """Set the longest wait of a blocking read, write or connect; 0 for no limit."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        with suppress(ConnectionError):
            opened.setsockopt(socket.SOL_SOCKET, option, value)
