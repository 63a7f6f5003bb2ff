"""Writing on threads: the same bits, sums that need no second look at a file, nothing left of what was not written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import xxhash
from fixtures.stores import EXTRAS, flip, manifest, tree, write_store
from hypothesis import given
from hypothesis import strategies as st

from kava.errors import DamagedStoreError
from kava.store import CODECS, LOSSY, BackgroundWriter, KVStore
from kava.store.codec import Chunk, crc32c
from kava.store.files import file_table
from kava.store.hashing import FileHash, hash_bytes, hash_file

LENGTHS = [3, 4, 9, 1, 6, 12, 5]


@pytest.mark.parametrize("codec", [*CODECS, *LOSSY])
def test_encoders_write_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Shards of two pages: the hashes taken while writing are those of the files, as `verify` finds."""
    monkeypatch.setattr("kava.store.shard.SHARD_PAGES", 2)
    plain, samples = write_store(tmp_path / "plain.zarr", LENGTHS, codec=codec, extras=EXTRAS)
    assert len(list((plain.path / "parts/00000").glob("importance/c/*"))) == 3
    assert plain.verify() == []
    store = KVStore.create(tmp_path / "threaded.zarr", manifest(codec=codec, extras=EXTRAS))
    with BackgroundWriter(store, encoders=3) as writer:
        for part in range(3):
            writer.begin(part)
            for position, index in enumerate(store.manifest.part_samples(part)):
                writer.append(position, samples[index])
            writer.commit()
    assert tree(store.path) == tree(plain.path)


@given(pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=5), as_array=st.booleans())
def test_the_hash_of_a_file_is_of_all_its_bytes(pieces: list[bytes], as_array: bool) -> None:
    file_hash, whole = FileHash(), b""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        with path.open("wb") as file:
            for piece in pieces:
                payload = np.frombuffer(piece, np.uint8) if as_array else piece
                chunk = Chunk(payload, crc32c(payload))
                chunk.write(file, file_hash)
                whole += piece + google_crc32c.value(piece).to_bytes(4, "little")
                assert chunk.nbytes == len(piece) + 4
        assert path.read_bytes() == whole
        assert hash_file(path) == hash_bytes(whole) == file_hash.hexdigest == xxhash.xxh3_128(whole).hexdigest()
    assert file_hash.size == len(whole)


def test_a_file_that_is_shorter_than_what_was_written_is_an_error(tmp_path: Path) -> None:
    (path := tmp_path / "c").write_bytes(b"1234")
    assert file_table(tmp_path, {}) == {"c": (4, xxhash.xxh3_128(b"1234").hexdigest())}
    assert file_table(tmp_path, {path: (4, "known")}) == {"c": (4, "known")}
    with pytest.raises(OSError, match="Input/output error"):
        file_table(tmp_path, {path: (5, "known")})


def test_rows_behind_a_sample_are_not_read_where_pages_are_stored_as_they_are(tmp_path: Path) -> None:
    """A flip there changes no number, and is `verify`'s to find; extra arrays, that do not end in zeros, are read whole."""
    store, samples = write_store(tmp_path / "s.zarr", [3, 5], codec="none", samples_per_part=2, extras=EXTRAS)
    row = store.part(0).pages["keys"].array.page_bytes // 4
    for at, changes in ((row + 1, True), (3 * row + 1, False)):  # In a row of sample 0, and behind its last.
        flip(store.path / "parts/00000/keys/c/0/0/0/0", at)
        opened = KVStore.open(store.path)
        if changes:
            with pytest.raises(DamagedStoreError, match="chunk 0: checksum mismatch"):
                opened[0]
        else:
            found, wanted = opened[0].keys, samples[0].keys
            assert found is not None
            assert wanted is not None
            assert torch.equal(found, wanted.bfloat16())
        assert [d.chunk for d in opened.verify()] == [0]
        flip(store.path / "parts/00000/keys/c/0/0/0/0", at)
    row = store.part(0).pages["importance"].array.page_bytes // 4
    for index, made in enumerate(samples):
        np.testing.assert_array_equal(KVStore.open(store.path)[index].extras["importance"], made.extras["importance"])
    flip(store.path / "parts/00000/importance/c/0/0/0", 3 * row + 1)
    with pytest.raises(DamagedStoreError, match=r"importance.*chunk 0: checksum mismatch"):
        KVStore.open(store.path)[0]
