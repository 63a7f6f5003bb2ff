"""A store's keys or values as a dask array; each block is read where it is computed, by a store opened there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import StoreError

if TYPE_CHECKING:
    import dask.array as da

    from .store import KVStore

_BLOCK_BYTES: Final = 64 << 20


def dask_array(store: KVStore, name: str) -> da.Array:
    """`[all tokens, l, h, d]`: one block per run of samples of about 64 MiB; bfloat16 as float32, which is exact."""
    import dask
    import dask.array as da

    dtype = np.dtype(np.float32 if store.manifest.dtype == "bfloat16" else store.dtype.numpy)
    shape = store.geometry.shape
    row_bytes = store.geometry.bytes_per_token(dtype.itemsize) // 2
    load = dask.delayed(_read_block, pure=True)
    blocks = []
    for number in store.committed_parts():
        part = store.part(number)
        for run in _runs(part.lengths.tolist(), max(1, _BLOCK_BYTES // row_bytes)):
            tokens = int(part.lengths[run.start : run.stop].sum())
            block = load(str(store.path), store.check, number, run.start, run.stop, name, part.digest)
            blocks.append(da.from_delayed(block, (tokens, *shape), dtype))
    if not blocks:
        return da.zeros((0, *shape), dtype=dtype)
    return da.concatenate(blocks)


def _runs(lengths: list[int], limit: int) -> Iterator[range]:
    """Consecutive samples whose tokens together stay at or under `limit`, at least one sample a run."""
    first = total = 0
    for position, length in enumerate(lengths):
        if total and total + length > limit:
            yield range(first, position)
            first, total = position, 0
        total += length
    if total:
        yield range(first, len(lengths))


def _read_block(
    path: str, check: bool, number: int, first: int, stop: int, name: str, digest: str
) -> np.ndarray[Any, Any]:
    from .store import KVStore

    store = KVStore.open(path, check=check)
    part = store.part(number)
    if part.digest != digest:
        raise StoreError(f"{path}: part {number} was rewritten since this dask array was made; make it again")
    arrays = [part.read(name, position) for position in range(first, stop) if part.lengths[position]]
    joined = np.concatenate(arrays)
    return store.dtype.to_float32(joined) if store.manifest.dtype == "bfloat16" else joined
