"""Files that are whole or absent: fsync, rename, and what a full or read-only disk means to a user."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from ..errors import DamagedStoreError, KavaError, RetryLaterError, StoreError
from .hashing import hash_file

_FLUSHES: Final = 8
_REMOVALS: Final = 1000
"""Attempts at removing a folder; each ends at a file that another process removed first."""
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_RETRY: Final = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` while writing below `path` into an error that says how to mend it.

    Raises:
        RetryLaterError: the disk is full or failing.
        StoreError: the place cannot be written.
    """
    try:
        yield
    except KavaError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _RETRY:
            raise RetryLaterError(
                f"{path}: {reason.lower()}; make room and run the same command again, finished parts are kept"
            ) from error
        raise StoreError(
            f"{path}: cannot write here: {reason.lower()}; choose another run_dir or its rights"
        ) from error


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns an `OSError` while reading `path` into an error that says what it means; a missing file stays one.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedStoreError: the disk cannot give back what was written to it.
        RetryLaterError: a file server lost track of the file.
        StoreError: the file must not be read.
    """
    try:
        yield
    except (KavaError, FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        if error.errno == errno.ESTALE:
            raise RetryLaterError(f"{path}: {reason}; run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise StoreError(f"{path}: cannot be read: {reason}. Change its rights, or ask its owner to.") from error
        raise DamagedStoreError(f"{path}: cannot be read: {reason}") from error


def refuse_url(path: Path | str, key: str = "") -> None:
    """Refuse an address such as `s3://bucket/run`: it would be taken for a local folder named `s3:`.

    Args:
        path: the path, also as `Path` writes an address, with a single slash.
        key: the recipe's key or the command's argument, for the message.

    Raises:
        StoreError: if it is one.
    """
    if _URL.match(str(path)):
        where = f"{key}: {str(path)!r}" if key else f"{str(path)!r}"
        raise StoreError(f"{where} is a URL, which is not supported here. Give a local path, or mount the bucket")


def is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder: not on read-only media, nor in another user's folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def read_all(file: int, nbytes: int, offset: int) -> bytes:
    """Return `nbytes` bytes from `offset` on, or those up to the end: file servers and FUSE may return less at once."""
    data = os.pread(file, nbytes, offset)
    while len(data) < nbytes and (more := os.pread(file, nbytes - len(data), offset + len(data))):
        data += more
    return data


def read_small(path: Path | str, limit: int) -> bytes:
    """Return the bytes of a regular file that someone else may have put there.

    A store or run folder may lie behind a link; the files in it may not, so that nobody else's bytes are taken for its
    own. The file is examined before it is opened, because opening some devices has effects, and again afterwards.

    Args:
        path: the file.
        limit: its largest size in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedStoreError: if it is a link, a folder, a named pipe, a socket or a device, or larger than `limit`.
        StoreError: if it must not be read.
    """
    with reading(path):
        _check_regular(path, os.lstat(path))
        # Should a pipe have taken its place meanwhile, opening it does not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            _check_regular(path, status)
            if status.st_size > limit:
                raise DamagedStoreError(f"{path}: has {status.st_size:,} bytes, expected {limit:,} at most")
            return read_all(descriptor, status.st_size, 0)
        finally:
            os.close(descriptor)


_KINDS: Final = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path | str) -> None:
    """Check that a file is a regular one before a library opens it; see `read_small`.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedStoreError: if it is a link or a special file.
    """
    with reading(path):
        _check_regular(path, os.lstat(path))


def _check_regular(path: Path | str, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise DamagedStoreError(
            f"{path}: {_KINDS.get(kind, 'no file')} where a regular file was written. Restore the file, or remove it"
        )


def write_protect(root: Path) -> None:
    """Takes the right to write from every file below `root`: an editor or a stray `>` then fails at once.

    Folders keep theirs: who may make parts must be able to rename and remove them. A file system without rights is none
    the worse for it, so that is no error.
    """
    for path in root.rglob("*"):
        if path.is_file():
            with suppress(OSError):
                path.chmod(path.stat().st_mode & 0o444)


def remove(path: Path) -> None:
    """Removes a folder with all that is in it, or a file, or a link and not what it leads to; or nothing.

    Several processes may remove the same folder at once.
    """
    for attempt in range(_REMOVALS):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # Another process was faster with a file in it.
            if attempt == _REMOVALS - 1:
                raise


def fsync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # A pipe must not block.
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path, *, shared: bool = False) -> None:
    """Flushes every file and directory below `root`, and `root` itself; on threads, as a disk flushes many at once.

    Args:
        root: the folder.
        shared: whether other processes write below it: their locks and temporary files may disappear meanwhile.
    """

    def flush(path: Path) -> None:
        with suppress(FileNotFoundError) if shared else nullcontext():
            fsync(path)

    with ThreadPoolExecutor(_FLUSHES, "kava-fsync") as pool:
        for _ in pool.map(flush, [root, *(path for path in root.rglob("*") if _is_flushed(path))]):
            pass


def _is_flushed(path: Path) -> bool:
    """Return whether a path is a file or a folder, no link and no special file."""
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def make_folder(path: Path) -> None:
    """Create a folder with its missing parents, and flush the entry of each."""
    missing, place = [], path
    while not place.exists():
        missing.append(place)
        place = place.parent
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old bytes or the new ones, never a part of them."""
    with disk_errors(path):
        make_folder(path.parent)
        # Not the process id alone: another host may have the same.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            temporary.write_bytes(data)
            fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def size_of(root: Path) -> int:
    """Bytes of all files below `root` that are not hidden, and in no hidden folder."""
    total = 0
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for name in files:
            with suppress(FileNotFoundError):  # Another process may put another in its place.
                total += (Path(folder) / name).stat().st_size
    return total


def link(path: Path, target: Path) -> None:
    """Makes `path` a symbolic link to `target`, in the place of another link."""
    with disk_errors(path):
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        temporary.symlink_to(target)
        temporary.replace(path)
        fsync(path.parent)


def file_table(folder: Path, known: Mapping[Path, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Return size and hash of every file below `folder`, except its own `zarr.json`.

    Args:
        folder: folder of a part.
        known: size and hash of files that were hashed while they were written; those are not read again.

    Raises:
        OSError: if a file is not as long as what was written to it.
    """
    table = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "zarr.json"):
        size, digest = known[path] if path in known else (path.stat().st_size, hash_file(path))
        if path.stat().st_size != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        table[path.relative_to(folder).as_posix()] = (size, digest)
    return table
