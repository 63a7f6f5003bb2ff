"""The headers of Zarr arrays, checked before any Zarr library reads them.

Zarr looks codecs up by name among all that are installed, and some run code or open other files: `pickle` of numcodecs
does both. A header is therefore compared with what kava itself writes, field by field; anything else is refused.
Pass `zarr_format=3` wherever such an array is opened, so that a Zarr v2 header beside this one is never looked at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from ..errors import DamagedStoreError
from .files import reading
from .safe_json import read_json_object, shortened

CODECS_READ: Final = frozenset({"bytes", "blosc", "crc32c", "sharding_indexed", "vlen-utf8", "zstd"})
"""Names of the Zarr codecs that kava writes."""

DATA_TYPES: Final = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
    "string": 1,
}
"""The Zarr data types that kava writes, with the fewest bytes of one element."""

_HEADER_BYTES: Final = 1 << 20
_MAX_AXES: Final = 12
_MAX_LENGTH: Final = 1 << 48
_MAX_CHUNK_BYTES: Final = 1 << 30
"""Zarr allocates a whole chunk before it reads it; see `manifest.MAX_PAGE_BYTES`."""

_SETTINGS: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    "bytes": {"endian": (str,)},
    "blosc": {"typesize": (int,), "cname": (str,), "clevel": (int,), "shuffle": (str,), "blocksize": (int,)},
    "crc32c": {},
    "sharding_indexed": {"chunk_shape": (list,), "codecs": (list,), "index_codecs": (list,), "index_location": (str,)},
    "vlen-utf8": {},
    "zstd": {"level": (int,), "checksum": (bool,)},
}
_FIELDS: Final = frozenset(
    {
        "zarr_format",
        "node_type",
        "shape",
        "data_type",
        "chunk_grid",
        "chunk_key_encoding",
        "fill_value",
        "codecs",
        "attributes",
        "dimension_names",
        "storage_transformers",
    }
)


def check_zarr_array(header: Path) -> dict[str, Any]:
    """Return the header of an array that kava could have written.

    Args:
        header: the `zarr.json` of the array.

    Raises:
        DamagedStoreError: if it is missing or no regular file, not that of a Zarr v3 array, or names a codec, data
            type or size that kava does not write.
    """
    try:
        with reading(header):
            fields = read_json_object(header, _HEADER_BYTES)
    except FileNotFoundError:
        raise DamagedStoreError(f"{header}: the file is missing") from None
    try:
        _check_fields(fields)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DamagedStoreError(f"{header}: not the header of an array that kava writes: {reason}") from None
    return fields


def _check_fields(fields: dict[str, Any]) -> None:
    if fields["zarr_format"] != 3 or fields["node_type"] != "array":
        raise ValueError(f"zarr_format {shortened(fields['zarr_format'])}, expected 3; node_type must be 'array'")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"the field {shortened(unknown[0])} is unknown")
    data_type = fields["data_type"]
    if not isinstance(data_type, str) or data_type not in DATA_TYPES:
        raise ValueError(f"data_type {shortened(data_type)}, expected one of {', '.join(DATA_TYPES)}")
    itemsize, shape = DATA_TYPES[data_type], _lengths("shape", fields["shape"], 0)
    if not isinstance(fields["fill_value"], int | float | str):
        raise ValueError(f"fill_value {shortened(fields['fill_value'])}, expected a number or a text")
    grid = _named("chunk_grid", fields["chunk_grid"], "regular", {"chunk_shape"})
    chunk = _lengths("chunk_shape", grid["chunk_shape"], 1)
    if len(chunk) != len(shape):
        raise ValueError(f"chunk_shape has {len(chunk)} axes, expected {len(shape)}")
    if _named("chunk_key_encoding", fields["chunk_key_encoding"], "default", {"separator"})["separator"] != "/":
        raise ValueError("chunk_key_encoding: the separator must be '/'")
    if fields.get("storage_transformers"):
        raise ValueError("storage_transformers must be empty")
    if not isinstance(fields.get("attributes", {}), dict):
        raise ValueError("attributes must be an object")
    names = fields.get("dimension_names")
    if names is not None and not (isinstance(names, list) and len(names) == len(shape)):
        raise ValueError("dimension_names must name every axis")
    inner = _check_codecs("codecs", fields["codecs"], len(shape), sharded=True)
    if math.prod(inner or chunk) * itemsize > _MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {inner or chunk} {data_type} is larger than {_MAX_CHUNK_BYTES:,} bytes")


def _check_codecs(where: str, codecs: Any, axes: int, *, sharded: bool) -> list[int] | None:
    """Check a list of codecs; return the shape of the chunks inside a shard, if this is one."""
    if not isinstance(codecs, list) or not codecs or len(codecs) > len(CODECS_READ):
        raise ValueError(f"{where} must be a list of one to {len(CODECS_READ)} codecs")
    inner = None
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in CODECS_READ or not (sharded or name != "sharding_indexed"):
            raise ValueError(f"codec {shortened(name)} is not read. Allowed: {', '.join(sorted(CODECS_READ))}")
        settings = _named(where, codec if isinstance(codec, dict) else {"name": codec}, name, set(_SETTINGS[name]))
        for key, value in settings.items():
            if type(value) not in _SETTINGS[name][key]:
                raise ValueError(f"codec {name}: {key} is {shortened(value)}")
        if name == "sharding_indexed":
            if len(codecs) > 1:
                raise ValueError("sharding_indexed must be the only codec")
            inner = _lengths("chunk_shape", settings["chunk_shape"], 1)
            if len(inner) != axes:
                raise ValueError(f"chunk_shape has {len(inner)} axes, expected {axes}")
            for key in ("codecs", "index_codecs"):
                _check_codecs(key, settings[key], axes, sharded=False)
    return inner


def _named(where: str, value: Any, name: str, keys: set[str]) -> dict[str, Any]:
    """Return the configuration of `{"name": name, "configuration": {...}}`, which may have these keys alone."""
    if not isinstance(value, dict) or value.get("name") != name or value.keys() - {"name", "configuration"}:
        raise ValueError(f"{where} is {shortened(value)}, expected {name!r} and its configuration")
    settings = value.get("configuration", {})
    if not isinstance(settings, dict) or settings.keys() - keys:
        raise ValueError(f"{where}: {name!r} has the configuration {shortened(settings)}")
    return settings


def _lengths(what: str, value: Any, least: int) -> list[int]:
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_AXES:
        raise ValueError(f"{what} must be a list of 1 to {_MAX_AXES} lengths")
    for length in value:
        if type(length) is not int or not least <= length <= _MAX_LENGTH:
            raise ValueError(f"{what}: {shortened(length)} is no length between {least} and {_MAX_LENGTH}")
    return list(value)
