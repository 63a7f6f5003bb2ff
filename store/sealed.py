"""Sealed records: JSON files that hold the size and hash of every file they stand for, and a digest of themselves.

A record is written last, after all it stands for has been flushed to the disk, so a record that exists describes files
that are complete. It is compared with them before they are used: a flipped byte is named as damage and is never taken
for another input. The digests detect corruption, not tampering.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ..errors import DamagedStoreError, StoreError
from .files import disk_errors, fsync, fsync_tree, read_small, write_atomic
from .fingerprint import digest_json
from .hashing import hash_bytes, hash_file
from .safe_json import JSON_BYTES, parse_json

RECORD: Final = "kava.json"
"""Name of the record in the folder that it describes."""
_SMALL: Final = 1 << 26
"""Bytes up to which a quick check hashes a file; of a larger one it compares the size alone."""
NOT_SEALED: Final[tuple[str, ...]] = ("evaluate.json", "answers.jsonl")
"""Results of evaluations, written beside a trained student after its record; nothing is decided by them."""
_LATER: Final = (*NOT_SEALED, "heldout.json")
"""Files that may exist before a record names them."""
_LOADED: Final = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".txt", ".py")
"""Endings of files that `from_pretrained` looks for: one that no record names would change what is loaded."""


def sealed_text(record: Mapping[str, Any]) -> bytes:
    """Return the JSON text of a record with its own digest under `digest`."""
    plain = json.loads(json.dumps(record))
    return json.dumps({**plain, "digest": digest_json(plain)}, indent=1).encode()


def read_sealed(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read a file that `sealed_text` made; its digest is compared and left out.

    Args:
        path: the file; neither a link nor a special file, see `read_small`.
        limit: its largest size in bytes.

    Raises:
        FileNotFoundError: if there is none.
        DamagedStoreError: if it is not as it was written.
        StoreError: if it must not be read.
    """
    data = read_small(path, limit)
    try:
        record = parse_json(data, path, limit)
    except DamagedStoreError as error:
        raise DamagedStoreError(f"{path}: damaged: {error}. {_ADVICE}") from None
    return unsealed(record, path)


def unsealed(record: Any, path: Path) -> dict[str, Any]:
    """Return a parsed record without its digest, after comparing it.

    Raises:
        DamagedStoreError: if the digest is missing or differs.
    """
    stated = record.pop("digest", None) if isinstance(record, dict) else None
    if stated is None:
        raise DamagedStoreError(
            f"{path}: damaged: it has no digest, or was written before records were sealed. {_ADVICE}"
        )
    if stated != digest_json(record):
        raise DamagedStoreError(f"{path}: damaged: its digest is not that of its text. {_ADVICE}")
    return dict(record)


def settle(root: Path) -> None:
    """Give every file below `root` the mode that the umask leaves, and flush files and folders to the disk.

    safetensors creates files with mode 0600 whatever the umask is. Locks and temporary files of other processes may
    disappear meanwhile.
    """
    mode = 0o666 & ~_umask()
    for path in root.rglob("*"):
        with suppress(OSError):  # A file system without modes, or another user's file.
            if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
                path.chmod(mode)
    fsync_tree(root, shared=True)


def seal(path: Path) -> list[Any]:
    """Return what a record says of a file: its size and its hash."""
    return [path.stat().st_size, hash_file(path)]


def write_record(folder: Path, record: Mapping[str, Any], files: Iterable[Path] | None = None) -> dict[str, Any]:
    """Flush a folder and write the record that describes it.

    Args:
        folder: the folder, in which `kava.json` is written.
        record: what else the record says.
        files: the files that it stands for; None for all that are not hidden, except the record.

    Returns:
        The record as written, with `files`: size and hash by relative name.
    """
    with disk_errors(folder):
        settle(folder)
        chosen = visible_files(folder) if files is None else files
        names = {path.relative_to(folder).as_posix(): path for path in chosen}
        sealed = {**record, "files": {name: seal(path) for name, path in sorted(names.items())}}
        write_atomic(folder / RECORD, sealed_text(sealed))
        fsync(folder.parent)
    return sealed


def visible_files(folder: Path) -> list[Path]:
    """Return the files below a folder that are not hidden, in no hidden folder, and not its record."""
    found = []
    for root, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(root) / name for name in names if not name.startswith(".")]
    return [path for path in found if path != folder / RECORD]


def damaged_files(folder: Path, record: Mapping[str, Any], *, quick: bool = False) -> list[str]:
    """Compare a folder with its record.

    Args:
        folder: the folder.
        record: its record, as `read_sealed` returned it.
        quick: compare sizes alone of files above 64 MiB.

    Returns:
        One line for each file that is missing, differs, or was added where loading would find it.
    """
    table = record.get("files")
    if not isinstance(table, dict):
        return [f"{folder / RECORD}: damaged: it has no table of files"]
    if not table:  # The record of what was begun and is not complete.
        return []
    lines = []
    for name, entry in table.items():
        if problem := _problem(folder, name, entry, quick):
            lines.append(f"{folder / name}: damaged: {problem}")
    for path in sorted(folder.iterdir()):
        listed = path.name in table or path.name == RECORD or path.name.startswith(".")
        if not listed and _is_loaded(path.name) and path.is_file():
            lines.append(f"{path}: damaged: this file was added after {RECORD} was written")
    return lines


def check_record(folder: Path, record: Mapping[str, Any], *, quick: bool = False) -> None:
    """Compare a folder with its record, see `damaged_files`.

    Raises:
        DamagedStoreError: if a file is not as it was written, naming it.
    """
    if lines := damaged_files(folder, record, quick=quick):
        rest = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise DamagedStoreError(f"{lines[0]}{rest}. {_ADVICE}")


def check_folder(folder: Path, *, quick: bool = False) -> None:
    """Compare what is loaded of a folder of weights with its record; a folder that kava did not write has none.

    A copy may lack files that loading does not look for, such as the recipe and the log.

    Raises:
        DamagedStoreError: if the record or a file is not as it was written, naming it.
    """
    try:
        record = read_sealed(folder / RECORD)
    except FileNotFoundError:
        return
    if isinstance(table := record.get("files"), dict):
        record["files"] = {name: entry for name, entry in table.items() if _is_loaded(name)}
    check_record(folder, record, quick=quick)


def check_entry(path: Path, entry: Any, *, quick: bool = False) -> None:
    """Compare one file with its entry in a record.

    Raises:
        DamagedStoreError: if it is not as it was written.
    """
    if problem := _problem(path.parent, path.name, entry, quick):
        raise DamagedStoreError(f"{path}: damaged: {problem}. {_ADVICE}")


def check_bytes(path: Path, data: bytes, entry: Any) -> None:
    """Compare the bytes that were read from a file with its entry in a record.

    Raises:
        DamagedStoreError: if they are not what was written.
    """
    if entry != [len(data), hash_bytes(data)]:
        raise DamagedStoreError(f"{path}: damaged: its bytes are not those that were written. {_ADVICE}")


_ADVICE: Final = "Restore it from a copy, or run kava repair"


def _problem(folder: Path, name: str, entry: Any, quick: bool) -> str:
    """What is wrong with a file; empty if nothing is.

    Raises:
        StoreError: if this user must not read it.
    """
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not isinstance(entry, list) or len(entry) != 2:
        return "its entry in the record is not one that kava writes"
    size, expected = entry
    path = folder / name
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return "it is not a regular file"
        if found.st_size != size:
            return f"it has {found.st_size} bytes, {size} were written"
        if not (quick and size > _SMALL) and hash_file(path) != expected:
            return "its bytes are not those that were written"
    except FileNotFoundError:
        return "it is missing"
    except PermissionError as error:  # Whether it is damaged, its owner can tell.
        raise StoreError(
            f"{path}: cannot be read: permission denied. Change its rights, or ask its owner to."
        ) from error
    except OSError as error:
        return f"it cannot be read: {os.strerror(error.errno or 0).lower()}"
    return ""


def _is_loaded(name: str) -> bool:
    """Whether `from_pretrained` looks for a file of this relative name."""
    path = PurePosixPath(name)
    return path.suffix in _LOADED and len(path.parts) == 1 and name not in _LATER


def _umask() -> int:
    """The umask of this process, without changing it where the kernel tells it."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
