"""A part's table, read as if a stranger had written it.

Nothing of a part is read before its table was checked: its digest, and the presence and type of every field. The table
names every other file with size and hash; the index, which everything else is read by, is compared with its hash.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from ..errors import DamagedStoreError, StoreNotFoundError
from .files import read_small, reading
from .fingerprint import digest_json
from .hashing import hash_bytes
from .index import INDEX_FILE, MAX_INDEX_BYTES
from .part import PartLayout, part_name
from .safe_json import parse_json, shortened
from .sample import SEGMENTS

_INSIDE: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
"""Names of files below a folder that lead nowhere else."""

HEADER_BYTES: Final = 64 << 20
"""Size limit of a `zarr.json`. A part's table grows with its files and its failed samples, about 200 bytes each."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class _Table(BaseModel):
    model_config = ConfigDict(strict=True)

    index: NonNegativeInt
    store: str
    num_rows: NonNegativeInt
    target_tokens: NonNegativeInt
    failed: dict[str, str]
    sources: dict[str, str]
    written_by: str = ""
    content: str
    coverage: list[Annotated[list[int], Field(min_length=3, max_length=3)]] | None = None
    files: dict[str, Annotated[list[int | str], Field(min_length=2, max_length=2)]]
    digest: str


def read_header(path: Path) -> dict[str, Any]:
    """Return the attributes of the `zarr.json` of a group.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedStoreError: if it is not a regular file of at most `HEADER_BYTES`, or not JSON; see `parse_json`.
        ValueError: if it is not the header of a Zarr v3 group.
    """
    data = read_small(path, HEADER_BYTES)
    header = parse_json(data, path, HEADER_BYTES)
    if _SURROGATE.search(data):
        try:
            json.dumps(header, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not valid Unicode") from None
    if not isinstance(header, dict) or header.get("zarr_format") != 3 or header.get("node_type") != "group":
        raise ValueError("not the header of a Zarr v3 group")
    # Consolidated metadata, above all: a Zarr library would read it in the place of the arrays' own headers.
    if unknown := sorted(header.keys() - {"zarr_format", "node_type", "attributes"}):
        raise ValueError(f"the field {shortened(unknown[0])} is unknown")
    attributes = header.get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError("'attributes' is missing")
    return attributes


def header_bytes(attributes: dict[str, Any]) -> bytes:
    """The `zarr.json` of a group with these attributes."""
    header = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(header, indent=1, ensure_ascii=False).encode()


def read_table(root: Path, layout: PartLayout, index: int) -> dict[str, Any]:
    """Read and check the table of a part; the files that it names are not looked at.

    Args:
        root: the store.
        layout: layout of its parts.
        index: number of the part.

    Raises:
        StoreNotFoundError: if the part has not been written.
        DamagedStoreError: if the table is not as it was written, or belongs to another store or place.
    """
    folder = f"{root}/parts/{part_name(index)}"
    header = Path(f"{folder}/zarr.json")
    _check_folder(folder)
    try:
        with reading(header):
            table = read_header(header)["kava_part"]
        if digest_json({k: v for k, v in table.items() if k != "digest"}) != table["digest"]:
            raise ValueError("digest mismatch")
        _Table.model_validate(table)
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise DamagedStoreError(f"{folder}: the file zarr.json is missing") from None
        raise StoreNotFoundError(f"{root}: part {index} is not written yet") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise DamagedStoreError(f"{header}: field {shortened(place)}: {first['msg']}") from None
    except DamagedStoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{header}: not readable: {error}") from None
    if table["store"] != layout.fingerprint or table["index"] != index:
        raise DamagedStoreError(f"{folder}: this part belongs to another store or place")
    samples = len(layout.manifest.part_samples(index))
    for field, good in (
        ("failed", all(_is_position(name, samples) for name in table["failed"])),
        ("num_rows", table["num_rows"] % layout.manifest.page_tokens == 0),
        ("coverage", table.get("coverage") is None or len(table["coverage"]) == len(SEGMENTS)),
        ("files", all(_is_entry(*entry) for entry in table["files"].values())),
    ):
        if not good:
            raise DamagedStoreError(f"{header}: field {field!r} does not fit the manifest")
    for name in table["files"]:
        if not _INSIDE.fullmatch(name):
            raise DamagedStoreError(f"{folder}: the table names {shortened(name)}, which is no file of a part")
    return dict(table)


def read_index(folder: str, table: Mapping[str, Any]) -> bytes:
    """Return the bytes of a part's index file, which must have the hash that the table names.

    Raises:
        DamagedStoreError: if it is missing, no plain file, or not as it was written.
    """
    path = f"{folder}/{INDEX_FILE}"
    size, digest = table["files"].get(INDEX_FILE, (0, ""))
    if not 0 < size <= MAX_INDEX_BYTES:
        raise DamagedStoreError(f"{folder}: the table names no {INDEX_FILE} that could be read")
    try:
        data = read_small(path, size)
    except FileNotFoundError:
        raise DamagedStoreError(f"{folder}: the file {INDEX_FILE} is missing") from None
    if len(data) != size or hash_bytes(data) != digest:
        raise DamagedStoreError(f"{path}: not as it was written")
    return data


def check_files(folder: str, files: Mapping[str, Sequence[Any]]) -> None:
    """Check that the files of a part are regular files of the size that its table names; their content is not read.

    Raises:
        DamagedStoreError: naming the first file that is not.
    """
    checked: set[str] = set()
    for name, (size, _) in files.items():
        parts = name.split("/")
        for depth in range(len(parts)):
            inner = "/".join([folder, *parts[:depth]])
            if inner not in checked:
                _check_folder(inner)
                checked.add(inner)
        try:
            found = os.lstat(f"{folder}/{name}")
        except FileNotFoundError:
            raise DamagedStoreError(f"{folder}: the file {name} is missing") from None
        except OSError as error:
            raise DamagedStoreError(f"{folder}: the file {name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedStoreError(f"{folder}: {name} is not a regular file; links are not followed")
        if found.st_size != size:
            raise DamagedStoreError(f"{folder}: the file {name} has {found.st_size} bytes, expected {size}")


def _is_position(name: str, samples: int) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 20 and int(name) < samples and name == str(int(name))


def _is_entry(size: object, digest: object) -> bool:
    return isinstance(size, int) and 0 <= size < 1 << 62 and isinstance(digest, str)


def _check_folder(folder: str) -> None:
    """Refuse a link: a store may lie behind one, a part and what is in it may not."""
    try:
        mode = os.lstat(folder).st_mode
    except OSError:
        return  # Whoever reads from it reports what is missing.
    if not stat.S_ISDIR(mode):
        raise DamagedStoreError(f"{folder}: a link or a file where a folder was written; links are not followed")
