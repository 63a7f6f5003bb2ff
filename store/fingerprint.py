"""Digests: of JSON values, of files, and of what determines a store's content."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON text of `value`, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 32 hexadecimal digits.

    The digest of a file above 1 MiB is remembered in the user's cache folder under its path, size, inode and
    times of change: a 15 GB checkpoint is read once, not at every `kava status`.
    """
    stat = path.stat()
    if stat.st_size < 1 << 20:
        return _sha256(path)
    key = digest_json([str(path.resolve()), *file_stamp(path)])
    note = cache_folder() / "digests" / key
    with suppress(OSError):  # A cache that is not there, or another user's, only costs time.
        if known := _sealed_note(note, key):
            return known
    found = _sha256(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.{os.getpid()}")
        temporary.write_text(f"{found} {digest_json([key, found])}")
        temporary.replace(note)
    except OSError:  # A home that cannot be written only costs time.
        pass
    return found


def _sealed_note(note: Path, key: str) -> str:
    """The digest in a note; empty if the note is not as it was written."""
    known, _, seal = note.read_text(errors="replace").partition(" ")
    return known if seal == digest_json([key, known]) else ""


def file_stamp(path: Path | str) -> tuple[int, int, int, int]:
    """What is another when a file was written again: size, inode, modification and change time.

    Only ever compared for equality: a clock may jump, and a copy may bring an old modification time along.
    """
    stat = os.stat(path)  # noqa: PTH116 - of a path that is asked for with every sample, as a string.
    return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def cache_folder() -> Path:
    """What can be made again at some cost: `$XDG_CACHE_HOME/kava`, by default `~/.cache/kava`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kava"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
