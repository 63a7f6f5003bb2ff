"""A part's table, read as if a stranger had written it.

Nothing of a part is read before its table was checked: that it is what its digest says, that every field is there and
of its type, that it names files inside the part alone, and that those are plain files of the size that was written.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from ..errors import DamagedStoreError, StoreNotFoundError
from .files import read_small, reading
from .fingerprint import digest_json
from .safe_json import parse_json, shortened
from .sample import Segment

if TYPE_CHECKING:
    from .manifest import Manifest

HEADER_BYTES: Final = 64 << 20
"""Size limit of a `zarr.json`. A part's table grows with its files and its failed samples, about 200 bytes each."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _Sums(_Checked):
    sum: list[float]
    sum_of_squares: list[float]


class _Statistics(_Checked):
    tokens: NonNegativeInt
    keys: _Sums
    values: _Sums


class _Table(_Checked):
    index: NonNegativeInt
    store: str
    num_rows: NonNegativeInt
    failed: dict[str, str]
    sources: dict[str, str]
    written_by: str = ""
    content: str | None = None
    statistics: _Statistics
    coverage: list[Annotated[list[int], Field(min_length=3, max_length=3)]] | None = None
    files: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
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


def read_table(root: Path, manifest: Manifest, index: int, folder: Path) -> dict[str, Any]:
    """The table of part `index` of the store at `root`, which lies at `folder`; checked, with the files it names.

    Raises:
        StoreNotFoundError: if the part is not written yet.
        DamagedStoreError: if it is not as it was written, or belongs to another store or place.
    """
    header = folder / "zarr.json"
    _check_folder(folder)
    try:
        with reading(header):
            table = read_header(header)["kava_part"]
        if digest_json({k: v for k, v in table.items() if k != "digest"}) != table["digest"]:
            raise ValueError("digest mismatch")
        _Table.model_validate(table)
    except FileNotFoundError:
        if folder.exists():
            raise DamagedStoreError(f"{folder}: the file zarr.json is missing") from None
        raise StoreNotFoundError(f"{root}: part {index} is not written yet") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise DamagedStoreError(f"{header}: field {place!r}: {first['msg']}") from None
    except DamagedStoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{header}: not readable: {error}") from None
    if table["store"] != manifest.fingerprint or table["index"] != index:
        raise DamagedStoreError(f"{folder}: this part belongs to another store or place")
    _check_fields(header, manifest, index, table)
    _check_files(folder, table["files"])
    return dict(table)


def _check_fields(header: Path, manifest: Manifest, index: int, table: dict[str, Any]) -> None:
    positions = {str(position) for position in range(len(manifest.part_samples(index)))}
    layers = manifest.geometry.num_layers
    sums = [table["statistics"][name][kind] for name in ("keys", "values") for kind in ("sum", "sum_of_squares")]
    for field, right in (
        ("failed", table["failed"].keys() <= positions),
        ("num_rows", table["num_rows"] % manifest.page_tokens == 0),
        ("statistics", all(len(numbers) == layers for numbers in sums)),
        ("coverage", table.get("coverage") is None or len(table["coverage"]) == len(Segment)),
    ):
        if not right:
            raise DamagedStoreError(f"{header}: field {field!r} does not fit the manifest")


def _check_files(folder: Path, files: dict[str, list[int]]) -> None:
    folders: set[PurePosixPath] = set()
    for name, (size, _) in files.items():
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name or path.as_posix() != name:
            raise DamagedStoreError(f"{folder}: the table names {name!r}, which is no file of a part")
        for inner in path.parents:
            if inner not in folders:
                _check_folder(folder / inner)
                folders.add(inner)
        try:
            found = (folder / name).lstat()
        except FileNotFoundError:
            raise DamagedStoreError(f"{folder}: the file {name} is missing") from None
        except OSError as error:
            raise DamagedStoreError(f"{folder}: the file {name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedStoreError(f"{folder}: {name} is a link or no file; what is outside a part is not read")
        if found.st_size != size:
            raise DamagedStoreError(f"{folder}: the file {name} has {found.st_size} bytes, expected {size}")


def _check_folder(folder: Path) -> None:
    """A store may lie behind a link, a part and what is in it may not: nobody else's bytes are taken for its own."""
    try:
        mode = folder.lstat().st_mode
    except OSError:
        return  # Whoever reads from it says what is missing.
    if not stat.S_ISDIR(mode):
        raise DamagedStoreError(f"{folder}: a link or a file where a folder was written; links are not followed")
