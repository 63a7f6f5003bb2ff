"""How many bytes and files a store will have.

Pages are counted exactly. What a part has beside them (tables, ids, spans, statistics) is not modelled: two small parts
are written to a temporary folder and measured. How well numbers compress depends on the numbers: without a probe the
ratios are those that were measured once, on one small model (docs/benchmarks.md), and an estimate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from ...store import LOSSY, KVSample, KVStore, Manifest, Split
from ...store.dtypes import dtype_of
from ...store.part import TOKENS, paged_arrays
from .tokens import TokenCount

LOSSLESS_RATIO: Final = {"bfloat16": 0.70, "float16": 0.87, "float32": 0.87}
"""Of `blosc-zstd`, to raw."""
LOSSY_RATIO: Final = {"int8": 0.52, "int4": 0.28}
"""To raw bfloat16, whatever the dtype."""
_CHECKSUM: Final = 4
"""Bytes beside those of a chunk."""
_REHEARSED: Final = (1, 5)
"""Samples in the two parts that are written to measure what comes with them."""


@dataclass(frozen=True)
class StoreSize:
    """A store as it will be."""

    bytes: int
    files: int
    tokens: int
    bytes_per_token: float
    """Of keys, values and arrays of rows on disk, padding included."""
    raw_bytes_per_token: int
    """Of keys and values in memory."""
    estimated: str
    """What the bytes rest on that was not measured; empty if nothing."""


def store_size(
    manifest: Manifest,
    count: TokenCount,
    *,
    among: Collection[int] | None = None,
    parts: int | None = None,
    measured: float | None = None,
) -> StoreSize:
    """What a store under this manifest will take.

    Args:
        manifest: only its geometry, dtype, codec, pages, extra arrays and parts count.
        count: tokens of its time axis.
        among: only these samples.
        parts: how many parts that is; the manifest's if not given.
        measured: bytes per token on disk, from a probe.
    """
    page, itemsize = manifest.page_tokens, dtype_of(manifest.dtype).itemsize
    tokens, rows = count.rows(1, among), count.rows(page, among)
    num_parts = manifest.num_parts if parts is None else parts
    raw = manifest.geometry.bytes_per_token(itemsize)
    extra = sum(np.dtype(e.numpy).itemsize * int(np.prod(e.shape)) for e in manifest.extras.values() if e.axis == "row")
    layout = paged_arrays(manifest)
    arrays, token_bytes = layout.values(), rows * layout[TOKENS].page_bytes // page  # Never compressed.
    pages = -(-rows // page // max(num_parts, 1))
    shards = {array.name: -(-pages // array.pages_per_shard) for array in arrays}
    index = num_parts * sum(shards[a.name] * a.index_bytes for a in arrays)
    estimated = ""
    if measured is not None:
        paged = tokens * measured + index
    elif manifest.codec == "none":
        paged = rows * (raw + extra) + token_bytes + rows // page * len(arrays) * _CHECKSUM + index
    else:
        if manifest.codec in LOSSY:
            body = LOSSY_RATIO[manifest.codec] * manifest.geometry.bytes_per_token(2)
        else:
            body = LOSSLESS_RATIO[manifest.dtype] * raw
        estimated = f"{manifest.codec} of {manifest.dtype} usually takes {body / raw:.2f} of raw"
        paged = tokens * (body + extra) + token_bytes + rows // page * len(arrays) * _CHECKSUM + index
    fixed, per_row, files = _beside(manifest)
    beside = num_parts * fixed + rows * per_row
    return StoreSize(
        bytes=round(paged + beside),
        files=num_parts * (files + sum(shards.values()) - len(shards)) + 2,
        tokens=tokens,
        bytes_per_token=paged / max(tokens, 1),
        raw_bytes_per_token=raw,
        estimated=estimated if count.is_exact else "; ".join(filter(None, [estimated, "tokens of a sample"])),
    )


def paged_bytes(store: KVStore) -> float:
    """Bytes on disk of keys, values and arrays of rows, per token, without the indices of their shards."""
    return _in_shards(store, without_index=True) / max(store.num_tokens, 1)


def _in_shards(store: KVStore, *, without_index: bool = False) -> int:
    found = 0
    for number in store.committed_parts():
        for pages in store.part(number).pages.values():
            index = pages.array.index_bytes if without_index else 0
            found += sum(size - index for size in pages.sizes)
    return found


@cache
def _measure(description: str) -> tuple[float, float, int]:
    manifest = Manifest.model_validate_json(description)
    rows, sizes = [], []
    files = 0
    for samples in _REHEARSED:
        described = manifest.model_copy(update={"num_samples": samples, "samples_per_part": samples})
        with tempfile.TemporaryDirectory(prefix="kava-plan-") as folder:
            store = KVStore.create(Path(folder) / "x.zarr", described)
            with store.write_part(0) as writer:
                for number in range(samples):
                    writer.append(number, _sample(described, number))
                writer.commit({"parent": "0" * 32}, written_by="hf 5.0.0")
            inside = store.path / "parts/00000"
            everything = [path for path in inside.rglob("*") if path.is_file()]
            files = len(everything)
            sizes.append(sum(path.stat().st_size for path in everything) - _in_shards(store))
            rows.append(store.part(0).num_rows)
    slope = (sizes[1] - sizes[0]) / (rows[1] - rows[0])
    return sizes[0] - slope * rows[0], slope, files


def _beside(manifest: Manifest) -> tuple[float, float, int]:
    """Bytes of a part beside its pages: fixed, and per row; and its files."""
    return _measure(manifest.model_dump_json(exclude={"fingerprint"}))


def _sample(manifest: Manifest, number: int) -> KVSample:
    import torch

    rng = np.random.default_rng(number)
    tokens = 192 if manifest.kind != "selected" else manifest.page_tokens
    stops = np.cumsum(rng.integers(2, 7, tokens)).astype(np.int32)
    kv = torch.from_numpy(rng.standard_normal((tokens, *manifest.geometry.shape), dtype=np.float32))
    extras = {
        name: np.zeros((*((tokens,) if kind.axis == "row" else ()), *kind.shape), kind.numpy)
        for name, kind in manifest.extras.items()
    }
    return KVSample(
        sample_id=f"sample-{number:08d}",
        split=Split.TRAIN,
        keys=kv,
        values=kv,
        input_ids=rng.integers(0, 30000, tokens).astype(np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        spans=np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1).astype(np.int32),
        segments=np.full(tokens, 2, np.uint8),
        mask=np.ones(tokens, np.bool_),
        extras=extras,
    )
