"""Files of a store in each other's places: verification names both, and reading never returns a wrong number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.stores import EXTRAS, manifest, overwrite, sample

from kava.errors import KavaError
from kava.store import KVSample, KVStore, verify_store

LENGTHS = [6, 6, 3, 5]
FIELDS = ("input_ids", "positions", "spans", "segments", "mask")


def written(path: Path, seed: int, **changes: Any) -> dict[int, bytes]:
    """Write a store of two parts whose content depends on the seed; return what every sample must read as."""
    store = KVStore.create(path, manifest(len(LENGTHS), samples_per_part=2, extras=EXTRAS, **changes))
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(store.manifest.part_samples(part)):
                writer.append(position, sample(seed + index, LENGTHS[index], extras=EXTRAS))
            writer.commit()
    return {index: content(store[index]) for index in range(len(store))}


def content(found: KVSample) -> bytes:
    """Return everything that a sample consists of."""
    assert found.keys is not None
    assert found.values is not None
    tensors = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in (found.keys, found.values)]
    arrays = [getattr(found, name).tobytes() for name in FIELDS] + [found.extras[n].tobytes() for n in sorted(EXTRAS)]
    return b"|".join([found.sample_id.encode(), bytes([found.split]), *tensors, *arrays])


def part_of(path: Path, root: Path) -> int | None:
    names = path.relative_to(root).parts
    return int(names[1]) if len(names) > 2 else None


def reads_right(root: Path, expected: dict[int, bytes], parts: set[int | None]) -> bool:
    """Return whether every sample of these parts is read; assert that none is read wrongly."""
    complete = True
    for index, right in expected.items():
        if None not in parts and index // 2 not in parts:
            continue
        try:
            found = content(KVStore.open(root)[index])
        except KavaError:
            complete = False
            continue
        assert found == right, index
    return complete


def damaged(root: Path, parts: set[int | None]) -> set[int | None]:
    try:
        store = KVStore.open(root)
    except KavaError:
        return {None}
    named = None if None in parts else [number for number in parts if number is not None]
    return {damage.part for damage in verify_store(store, parts=named)}


def check_pairs(files: list[tuple[Path, Path]], expected: dict[Path, dict[int, bytes]]) -> int:
    """Exchange every pair of files of equal length and different bytes, given with the stores they are in."""
    count = 0
    known = {path: path.read_bytes() for path, _ in files}
    for (one, first), (two, second) in itertools.combinations(files, 2):
        if len(known[one]) != len(known[two]) or known[one] == known[two]:
            continue
        count += 1
        overwrite(one, known[two])
        overwrite(two, known[one])
        for path, root in {(one, first), (two, second)}:
            parts = {part_of(path, root)}
            assert damaged(root, parts), (one, two, path)
            reads_right(root, expected[root], parts)
        overwrite(one, known[one])
        overwrite(two, known[two])
    return count


@pytest.mark.parametrize("codec", ["none", pytest.param("blosc-zstd", marks=pytest.mark.slow)])
def test_every_pair_of_files(tmp_path: Path, codec: str) -> None:
    """Within a part, between parts, between stores, and between two captures with one fingerprint."""
    stores = {
        tmp_path / "one.zarr": written(tmp_path / "one.zarr", 0, codec=codec),
        tmp_path / "again.zarr": written(tmp_path / "again.zarr", 100, codec=codec),
        tmp_path / "other.zarr": written(tmp_path / "other.zarr", 200, codec=codec, corpus_digest="other"),
    }
    one, again, other = map(KVStore.open, stores)
    assert one.manifest.fingerprint == again.manifest.fingerprint != other.manifest.fingerprint
    assert len({store.part(number).digest for store in (one, again, other) for number in range(2)}) == 6
    files = [(path, root) for root in stores for path in sorted(root.rglob("*")) if path.is_file()]
    count = check_pairs(files, stores)
    assert count > 150, count
    assert all(reads_right(root, right, {None}) for root, right in stores.items())
    assert not [damage for root in stores for damage in KVStore.open(root).verify()]


def test_every_pair_of_chunks_in_a_shard(tmp_path: Path) -> None:
    """The shard's own index still fits them."""
    right = written(tmp_path / "s.zarr", 0, codec="none")
    store, count = KVStore.open(tmp_path / "s.zarr"), 0
    for number, name in itertools.product(range(2), ("keys", "values", "tokens", "importance")):
        pages = store.part(number).pages[name]
        (path,) = (Path(pages.path(shard)) for shard in range(len(pages.sizes)))
        good = path.read_bytes()
        for one, two in itertools.combinations(range(pages.num_pages), 2):
            data, size = bytearray(good), int(pages.table.nbytes[one])
            first, second = pages.offset(one), pages.offset(two)
            data[first : first + size], data[second : second + size] = (
                good[second : second + size],
                good[first : first + size],
            )
            if data == good:
                continue
            count += 1
            overwrite(path, bytes(data))
            assert not reads_right(store.path, right, {number})
            chunks = {damage.chunk for damage in KVStore.open(store.path).verify() if damage.array == name}
            assert {one, two} <= chunks
        overwrite(path, good)
    assert count > 10
    assert reads_right(store.path, right, {None})


def edits(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """One truncation, one extension, and one move of bytes within the file."""
    at = int(rng.integers(len(data)))
    yield data[:at]
    yield data + rng.bytes(int(rng.integers(1, 40)))
    size = int(rng.integers(1, 1 + len(data) // 2))
    source, target = rng.integers(0, len(data) - size + 1, 2).tolist()
    rest = data[:source] + data[source + size :]
    yield rest[:target] + data[source : source + size] + rest[target:]


def test_truncated_extended_and_moved_bytes(tmp_path: Path) -> None:
    right, rng = written(tmp_path / "s.zarr", 0), np.random.default_rng(0)
    root = tmp_path / "s.zarr"
    for path in sorted(p for p in (root / "parts/00001").rglob("*") if p.is_file()):
        good = path.read_bytes()
        for bad in edits(good, rng):
            if bad == good:
                continue
            overwrite(path, bad)
            assert damaged(root, {1}), (path, bad)
            reads_right(root, right, {1})
        overwrite(path, good)
    assert reads_right(root, right, {None})
