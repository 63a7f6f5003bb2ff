"""A store of very many samples: memory and open files do not grow with how many of them were read."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
from fixtures.stores import manifest, sample

from kava.store import KVGeometry, KVStore

SAMPLES, PER_PART = 200_000, 500
TINY = KVGeometry(num_layers=1, num_key_value_heads=1, head_dim=1)


def _megabytes() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
def test_reading_and_verifying_200_000_samples_stays_flat(tmp_path: Path) -> None:
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
        if part % 50 == 49:
            written.append(_megabytes())
            files.append(_open_files())
    assert written[-1] - written[0] < 20, written

    store, read = KVStore.open(tmp_path / "s.zarr"), []
    for index in range(0, SAMPLES, 7):
        assert len(store[index]) == 1
        if index % (SAMPLES // 20) < 7:
            read.append(_megabytes())
    assert len(store._parts) <= 64
    assert max(read[5:]) - read[5] < 20, read
    rng = np.random.default_rng(0)
    for index in rng.integers(0, SAMPLES, 2000).tolist():
        store.sample(index, keys=False)
    assert _megabytes() - read[5] < 30
    before = _megabytes()
    assert store.verify() == []
    assert _megabytes() - before < 30
    files.append(_open_files())
    assert max(files) <= files[0] + 2, files
