"""Arrays beside keys and values: declared, checked, read alone, proved whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.stores import EXTRAS, manifest, overwrite, sample, tree, write_store
from pydantic import ValidationError

from kava.errors import DamagedStoreError, ManifestMismatchError, StoreError
from kava.store import ExtraArray, KVStore

LENGTHS = [3, 4, 9, 1, 6, 12, 5]


def test_numbers_of_samples_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    description = manifest(extras=EXTRAS)
    store = KVStore.create(path, description)
    samples = [sample(n, length, extras=EXTRAS) for n, length in enumerate(LENGTHS)]
    with store.write_part(1) as writer:
        for position in range(2):
            writer.append(position, samples[3 + position])
        writer.fail(2, "sample-5", samples[5].split, "too long")
        writer.commit()
    expected = np.full(7, np.nan)
    expected[3:5] = [samples[3].extras["nats"], samples[4].extras["nats"]]
    np.testing.assert_array_equal(store.per_sample("nats"), expected)
    assert store.verify() == []
    for name in ("importance", "entropy"):
        with pytest.raises(StoreError, match=f"no number '{name}' is kept for samples; there is nats"):
            store.per_sample(name)


def test_extras_are_read_only_if_asked_for(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS, extras=EXTRAS)
    shard = store.path / "parts/00000/importance/c/0/0/0"
    overwrite(shard, b"\0" * shard.stat().st_size)
    assert store.sample(0, extras=False).extras.keys() == {n for n, kind in EXTRAS.items() if kind.axis == "sample"}
    assert store.batch([0, 1]).keys is not None
    with pytest.raises(DamagedStoreError, match="importance"):
        store[0]


def test_a_damaged_extra_names_its_chunk_and_sample(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS, extras=EXTRAS)
    shard = store.path / "parts/00001/indices/c/0/0/0"
    good = bytearray(shard.read_bytes())
    good[store.part(1).pages["indices"].offset(1) + 17] ^= 8
    overwrite(shard, bytes(good))
    (damage,) = KVStore.open(store.path).verify()
    assert (damage.part, damage.array, damage.chunk, damage.sample_ids) == (1, "indices", 1, ("sample-4",))


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, r"has the extra arrays \[\], the store holds \['importance', 'indices', 'nats'\]"),
        ({"more": np.zeros(3)}, "'more', 'nats'"),
        ({"importance": np.zeros((3, 2, 2), np.float32)}, r"importance is float32 \(3, 2, 2\), .* float32 \(3, 3, 2\)"),
        ({"nats": np.zeros((), np.float32)}, r"nats is float32 \(\), the store holds float64 \(\)"),
    ],
)
def test_a_sample_must_have_what_is_declared(tmp_path: Path, extras: dict[str, Any], message: str) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest(extras=EXTRAS))
    good = sample(0, 3, extras=EXTRAS)
    wrong = dataclasses.replace(good, extras=good.extras | extras if extras else {})
    with store.write_part(0) as writer, pytest.raises(StoreError, match=message):
        writer.append(0, wrong)


@pytest.mark.parametrize("name", ["keys", "mask", "../x", "A", ""])
def test_names_are_names_of_arrays(name: str) -> None:
    with pytest.raises(ValidationError, match="extra array"):
        manifest(extras={name: ExtraArray(axis="row", dtype="float32")})


def test_a_store_is_not_continued_with_other_extras(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS)
    before = tree(store.path)
    with pytest.raises(ManifestMismatchError, match=r"extras\.importance\.axis: None there, 'row' now"):
        KVStore.create(store.path, manifest(extras=EXTRAS))
    assert tree(store.path) == before
