"""A store of very many samples: memory and open files do not grow with how many of them were read."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
from fixtures.stores import manifest, sample

from kava.store import KVGeometry, KVStore
from kava.store.open_parts import OPEN_BYTES

SAMPLES, PER_PART = 1_000_000, 5_000
TINY = KVGeometry(num_layers=1, num_key_value_heads=1, head_dim=1)


def _megabytes() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
def test_a_million_samples_are_written_read_and_verified_in_flat_memory(tmp_path: Path) -> None:
    description = manifest(SAMPLES, PER_PART, geometry=TINY, page_tokens=1, codec="none")
    store = KVStore.create(tmp_path / "s.zarr", description)
    made = sample(0, 1, geometry=TINY)
    files: list[int] = []
    written: list[float] = []
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position in range(PER_PART):
                writer.append(position, made)
            writer.commit()
        if part % 20 == 19:
            written.append(_megabytes())
            files.append(_open_files())
    assert written[-1] - written[0] < 20, written

    store, read = KVStore.open(tmp_path / "s.zarr"), []
    room = np.zeros((1, 1, 1, 1), store.dtype.numpy)
    for index in range(0, SAMPLES, 20):
        assert len(store[index]) == store.read_into(index, keys=room) == 1
        if index % (SAMPLES // 20) == 0:
            read.append(_megabytes())
    assert sum(part.nbytes for part in store._parts._parts.values()) <= OPEN_BYTES
    assert len(store._parts) < 160  # After four fifths of the 200 parts, as many are open as ever are.
    assert max(read[16:]) - read[16] < 20, read
    for index in np.random.default_rng(0).integers(0, SAMPLES, 1000).tolist():
        store.read_into(index, keys=room)
    assert _megabytes() - read[16] < 30
    before = _megabytes()
    assert store.verify() == []
    assert _megabytes() - before < 30
    files.append(_open_files())
    assert max(files) <= files[0] + 2, files
