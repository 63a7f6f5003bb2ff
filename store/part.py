"""A part: the unit of writing, commit, rerun and verification.

A part is a Zarr group, written under a hidden name, flushed, and renamed into place. Its attributes name every file
with size and checksum, so that a missing or exchanged file is noticed when the part is opened, and the digests of the
parent parts it was made from. Here is what its writer and its reader agree on.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import StoreError
from .codec import CODECS, LOSSLESS_PART
from .dtypes import dtype_of
from .manifest import Manifest
from .quantize import LOSSY
from .shard import PagedArray

ROW_ARRAYS = {"input_ids": "<i4", "positions": "<i4", "spans": "<i4", "segments": "|u1", "mask": "|b1"}
KV = ("keys", "values")


def part_name(index: int) -> str:
    """The folder of a part below `parts/`."""
    return f"{index:05d}"


def paged_arrays(manifest: Manifest, folder: Path) -> dict[str, PagedArray]:
    """The layout of the arrays of a part that lie in pages: keys, values and the extra arrays of rows.

    Page `n` of tokens is chunk `n` of each of them.

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
            found[name] = PagedArray(folder / name, (page, *shape), *raw, ("token", "layer", "head", "dim"))
            continue
        for array, kind in quantizer.arrays(name, shape, page, dtype).items():
            chunk = (kind.rows, *kind.entry)
            found[array] = PagedArray(
                folder / array, chunk, kind.dtype, codec, kind.fill_value, kind.meaning, kind.axes
            )
    for name, extra in manifest.extras.items():
        if extra.axis == "row":
            chunk, axes = (page, *extra.shape), tuple(extra.dimension_names)
            found[name] = PagedArray(folder / name, chunk, extra.numpy, codec, extra.fill_value, extra.dtype, axes)
    return found
