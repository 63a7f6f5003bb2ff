"""A part: the unit of writing, commit, rerun and verification.

A part is a Zarr group, written under a hidden name, flushed, and renamed into place. Its attributes, the *table*, name
every file with size and hash, and the digests of the parent parts it was made from. One of these files is the *index*:
where each sample is and which checksum each chunk has. This module holds the layout that writer and reader share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import StoreError
from .codec import CODECS, LOSSLESS_PART
from .dtypes import dtype_of
from .index import KV
from .manifest import Manifest
from .quantize import LOSSY
from .sample import KVSample
from .shard import PagedArray

TOKENS: Final = "tokens"
"""Paged array `[rows, 6]` int32 of everything that is known of a token except its keys and values."""
TOKEN_FIELDS: Final = ("input_id", "position", "span_start", "span_stop", "segment", "mask")
"""Columns of `tokens`."""
SEGMENT_FIELD: Final = TOKEN_FIELDS.index("segment")
_TOKEN_CODEC: Final = CODECS["none"]
"""Tokens are 0.1 % of a store; uncompressed, a sample's are read with one system call."""


def pack_tokens(sample: KVSample) -> np.ndarray[Any, Any]:
    """Return the rows `[t, 6]` int32 of a sample in `tokens`."""
    columns = (sample.input_ids, sample.positions, sample.spans[:, 0], sample.spans[:, 1], sample.segments, sample.mask)
    return np.stack([np.asarray(column, "<i4") for column in columns], axis=1)


def unpack_tokens(rows: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the fields of a `KVSample` that `rows` `[t, 6]` of `tokens` hold."""
    return {
        "input_ids": rows[:, 0].copy(),
        "positions": rows[:, 1].copy(),
        "spans": rows[:, 2:4].copy(),
        "segments": rows[:, 4].astype(np.uint8),
        "mask": rows[:, 5].astype(np.bool_),
    }


def part_name(index: int) -> str:
    """The folder of a part below `parts/`."""
    return f"{index:05d}"


@dataclass(frozen=True)
class PartLayout:
    """Everything about the parts of a store that follows from its manifest, worked out once for all of them."""

    manifest: Manifest
    fingerprint: str
    arrays: Mapping[str, PagedArray]
    """Paged arrays by name."""

    @classmethod
    def of(cls, manifest: Manifest) -> PartLayout:
        """Return the layout of a store's parts.

        Raises:
            StoreError: if the codec is unknown.
        """
        return cls(manifest, manifest.fingerprint, paged_arrays(manifest))


def paged_arrays(manifest: Manifest) -> dict[str, PagedArray]:
    """Return the layout of the paged arrays of a part: keys, values, tokens and the extra arrays of rows.

    Page `n` of the token axis is chunk `n` of each of them.

    Raises:
        StoreError: if the codec is unknown.
    """
    dtype, page, shape = dtype_of(manifest.dtype), manifest.page_tokens, manifest.geometry.shape
    if manifest.codec not in {*CODECS, *LOSSY}:
        raise StoreError(f"codec {manifest.codec!r} is unknown: use one of {', '.join([*CODECS, *LOSSY])}")
    codec, quantizer = CODECS.get(manifest.codec, LOSSLESS_PART), LOSSY.get(manifest.codec)
    found = {}
    for name in KV:
        if quantizer is None:
            raw = (dtype.numpy, codec, dtype.fill_value, dtype.name)
            found[name] = PagedArray(name, (page, *shape), *raw, ("token", "layer", "head", "dim"))
            continue
        for array, kind in quantizer.arrays(name, shape, page, dtype).items():
            chunk = (kind.rows, *kind.entry)
            found[array] = PagedArray(array, chunk, kind.dtype, codec, kind.fill_value, kind.meaning, kind.axes)
    fields = (page, len(TOKEN_FIELDS))
    found[TOKENS] = PagedArray(TOKENS, fields, "<i4", _TOKEN_CODEC, 0, "int32", ("token", "field"))
    for name, extra in manifest.extras.items():
        if extra.axis == "row":
            chunk, axes = (page, *extra.shape), tuple(extra.dimension_names)
            found[name] = PagedArray(name, chunk, extra.numpy, codec, extra.fill_value, extra.dtype, axes)
    return found
