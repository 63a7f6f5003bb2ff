"""A part: the unit of writing, commit, rerun and verification.

A part is a Zarr group, written under a hidden name, flushed, and renamed into place. Its attributes name every file
with size and checksum, so that a missing or exchanged file is noticed when the part is opened, and the digests of the
parent parts it was made from. Here is what its writer and its reader agree on.
"""

from __future__ import annotations

from pathlib import Path

from .codec import codec_of
from .dtypes import dtype_of
from .manifest import Manifest
from .shard import PagedArray

ROW_ARRAYS = {"input_ids": "<i4", "positions": "<i4", "spans": "<i4", "segments": "|u1", "mask": "|b1"}
KV = ("keys", "values")


def part_name(index: int) -> str:
    """The folder of a part below `parts/`."""
    return f"{index:05d}"


def paged_arrays(manifest: Manifest, folder: Path) -> dict[str, PagedArray]:
    """The layout of the arrays of a part that lie in pages: `keys`, `values` and the extra arrays of rows."""
    kv = (manifest.geometry.shape, dtype_of(manifest.dtype).numpy)
    extras = {name: (kind.shape, kind.numpy) for name, kind in manifest.extras.items() if kind.axis == "row"}
    codec, page = codec_of(manifest.codec), manifest.page_tokens
    return {
        name: PagedArray(folder / name, (page, *shape), dtype, codec)
        for name, (shape, dtype) in (dict.fromkeys(KV, kv) | extras).items()
    }
