"""Indices and small arrays that a forger changed and sealed again: named in one line, whatever they hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
from fixtures.stores import overwrite, write_store

from kava.errors import DamagedStoreError
from kava.store import KVStore
from kava.store.fingerprint import digest_json
from kava.store.hashing import hash_bytes
from kava.store.index import INDEX_FILE


def _forge(store: Path, name: str, data: bytes) -> None:
    """Put these bytes in the place of a file of the first part, and make the table's digest right again."""
    part = store / "parts/00000"
    overwrite(part / name, data)
    header = json.loads((part / "zarr.json").read_text())
    table = header["attributes"]["kava_part"]
    table["files"][name] = [len(data), hash_bytes(data)]
    table["digest"] = digest_json({key: value for key, value in table.items() if key != "digest"})
    overwrite(part / "zarr.json", json.dumps(header).encode())


@pytest.mark.parametrize(
    ("column", "numbers", "message"),
    [
        (2, [0, 7, 0], "a split that is not known"),
        (2, [0, 2**40, 0], "a split that is not known"),
        (3, [1, 3, 5], "a sample id is not text"),
    ],
)
def test_samples_of_an_index_that_cannot_be(tmp_path: Path, column: int, numbers: list[int], message: str) -> None:
    store, _ = write_store(tmp_path / "s", [5, 6, 7])
    index = store.part(0).part_index
    samples = index.samples.copy()
    samples[:, column] = numbers
    ids = np.frombuffer("ééx".encode(), "|u1") if column == 3 else index.ids_utf8
    _forge(store.path, INDEX_FILE, dataclasses.replace(index, samples=samples, ids_utf8=ids).save())
    with pytest.raises(DamagedStoreError, match=message):
        KVStore.open(store.path)[0]
    assert [damage.array for damage in KVStore.open(store.path).verify()] == [INDEX_FILE]


@pytest.mark.parametrize("name", ["start", "sample_id"])
@pytest.mark.parametrize("data", [b"", b"no zstd at all", bytes(numcodecs.Zstd().encode(bytes(1 << 28))) + b"crc!"])
def test_a_small_array_that_does_not_decode_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    store, _ = write_store(tmp_path / "s", [5, 6, 7])
    _forge(store.path, f"{name}/c/0", data)
    assert [(damage.part, damage.array) for damage in KVStore.open(store.path).verify()] == [(0, name)]
