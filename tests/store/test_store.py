from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fixtures.stores import EXTRAS, GEOMETRY, flip, manifest, overwrite, read_open, read_path, sample, tree, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import (
    DamagedStoreError,
    ManifestMismatchError,
    PartExistsError,
    SampleFailedError,
    StoreError,
    StoreNotFoundError,
)
from kava.store import (
    CODECS,
    DTYPES,
    BackgroundWriter,
    ExtraArray,
    KVGeometry,
    KVSample,
    KVStore,
    Manifest,
    Split,
    default_page_tokens,
)
from kava.store.fingerprint import digest_json

LENGTHS = [3, 4, 9, 1, 6, 12, 5]


@pytest.fixture
def store(tmp_path: Path) -> KVStore:
    written: KVStore = write_store(tmp_path / "s.zarr", LENGTHS, extras=EXTRAS)[0]
    return written


def _equal(found: KVSample, wanted: KVSample, dtype: torch.dtype) -> None:
    assert found.sample_id == wanted.sample_id
    assert found.split == wanted.split
    for name in ("keys", "values"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs.to(dtype)), name
    for name in ("input_ids", "positions", "spans", "segments", "mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert found.extras.keys() == wanted.extras.keys()
    for name, array in wanted.extras.items():
        np.testing.assert_array_equal(found.extras[name], array)
        assert found.extras[name].dtype == array.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_round_trip(tmp_path: Path, dtype: str, codec: str) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, dtype=dtype, codec=codec)
    assert len(store) == len(samples)
    assert store.geometry == GEOMETRY
    for found, wanted in zip(store, samples, strict=True):
        _equal(found, wanted, getattr(torch, dtype))
    assert store.verify() == []


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    page=st.sampled_from([1, 2, 8, 32]),
    per_part=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 3, 8])),
    codec=st.sampled_from(sorted(CODECS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    extras=st.dictionaries(
        st.sampled_from(["a", "b_1", "importance"]),
        st.builds(
            ExtraArray,
            axis=st.sampled_from(["row", "sample"]),
            dtype=st.sampled_from(["float32", "float64", "int32"]),
            shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
        ),
    ),
)
def test_any_shape_round_trips_and_zarr_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    page: int,
    per_part: int,
    shape: Any,
    codec: str,
    dtype: str,
    extras: dict[str, ExtraArray],
) -> None:
    geometry = KVGeometry(num_layers=shape[0], num_key_value_heads=shape[1], head_dim=shape[2])
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    store, samples = write_store(
        path,
        lengths,
        page_tokens=page,
        samples_per_part=per_part,
        geometry=geometry,
        codec=codec,
        dtype=dtype,
        extras=extras,
    )
    assert store.verify() == []
    for index, (found, wanted) in enumerate(zip(store, samples, strict=True)):
        _equal(found, wanted, getattr(torch, dtype))
        part, position = divmod(index, per_part)
        group = zarr.open_group(path / "parts" / f"{part:05d}", mode="r", zarr_format=3)
        start, length = (int(group[name][position]) for name in ("start", "length"))  # type: ignore[index, arg-type]
        assert start % page == 0
        raw = np.asarray(group["keys"][start : start + length])  # type: ignore[index]
        np.testing.assert_array_equal(raw, DTYPES[dtype].to_numpy(wanted.keys))
        for name, kind in extras.items():
            rows: Any = slice(start, start + length) if kind.axis == "row" else position
            np.testing.assert_array_equal(group[name][rows], wanted.extras[name])
    np.testing.assert_array_equal(
        store.values.compute(),
        torch.cat([s.values for s in samples]).to(getattr(torch, dtype)).float().numpy().astype(store.values.dtype),
    )


def test_shards_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kava.store.shard.SHARD_PAGES", 3)
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, samples_per_part=7)
    shards = list((tmp_path / "s.zarr/parts/00000/keys/c").iterdir())
    assert len(shards) == math.ceil(sum(-(-n // 4) for n in LENGTHS) / 3)
    for found, wanted in zip(store, samples, strict=True):
        _equal(found, wanted, torch.bfloat16)
    whole = np.asarray(zarr.open_array(tmp_path / "s.zarr/parts/00000/keys", mode="r", zarr_format=3)[:])
    start = int(store.part(0).starts[5])
    np.testing.assert_array_equal(whole[start : start + 12], DTYPES["bfloat16"].to_numpy(samples[5].keys))


def test_dask_is_every_token_in_order_without_padding(store: KVStore) -> None:
    rows = torch.cat([s.keys for s in store]).float().numpy()  # type: ignore[misc]
    assert store.keys.shape == (sum(LENGTHS), *GEOMETRY.shape)
    np.testing.assert_array_equal(store.keys.compute(scheduler="synchronous"), rows)
    np.testing.assert_allclose(store.keys.mean(axis=(0, 2, 3)).compute(), rows.mean(axis=(0, 2, 3)), rtol=1e-5)


def test_batch_pads_on_the_right_and_masks(store: KVStore) -> None:
    batch = store.batch([0, 2], pad_token_id=5)
    assert batch.input_ids.shape == (2, 9)
    assert batch.attention_mask.sum(1).tolist() == [3, 9]
    assert (batch.input_ids[0, 3:] == 5).all()
    assert batch.keys is not None
    assert torch.equal(batch.keys[0, :3], store[0].keys)  # type: ignore[arg-type]
    assert not batch.keys[0, 3:].any()
    assert not batch.mask[0, 3:].any()
    assert store.batch([0], keys=False, values=False).keys is None


def test_only_what_is_asked_for_is_read(store: KVStore) -> None:
    shard = store.path / "parts/00000/values/c/0/0/0/0"
    overwrite(shard, b"\0" * shard.stat().st_size)
    assert store.sample(0, values=False).values is None
    with pytest.raises(DamagedStoreError):
        store.sample(0, keys=False)


def test_statistics_are_those_of_the_masked_tensors(tmp_path: Path) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, dtype="float32")
    for name in ("keys", "values"):
        rows = torch.cat([getattr(s, name)[torch.from_numpy(s.mask)] for s in samples]).double()
        np.testing.assert_allclose(store.statistics()[f"{name}_mean"], rows.mean((0, 2, 3)), atol=1e-7)
        np.testing.assert_allclose(store.statistics()[f"{name}_std"], rows.std((0, 2, 3), correction=0), rtol=1e-6)


def test_splits_and_ids(store: KVStore) -> None:
    assert store.indices(Split.HELDOUT) == [2, 5]
    assert store.indices() == list(range(7))
    assert store.indices_of(["sample-4", "sample-1", "no such"]) == {"sample-1": 1, "sample-4": 4}
    assert store.num_tokens == sum(LENGTHS)


def test_foreign_indices(store: KVStore) -> None:
    with pytest.raises(IndexError, match="sample 7 of 7"):
        store[7]
    assert store[-1].sample_id == "sample-6"


def test_missing_store_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no store at"):
        KVStore.open(tmp_path / "none.zarr")
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="not readable"):
        KVStore.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreError, match="not a kava store"):
        KVStore.open(tmp_path)


def test_other_formats_and_edited_manifests_are_refused(store: KVStore) -> None:
    header = store.path / "zarr.json"
    raw = json.loads(header.read_text())
    edited = json.loads(header.read_text())
    raw["attributes"]["kava"]["format_version"] = 1
    header.write_text(json.dumps(raw))
    with pytest.raises(StoreError, match=r"format 1, this kava reads 2. write the store again"):
        KVStore.open(store.path)
    raw["attributes"]["kava"]["format_version"] = 3
    header.write_text(json.dumps(raw))
    with pytest.raises(StoreError, match=r"format 3.*upgrade kava"):
        KVStore.open(store.path)
    for field, value in (("corpus_digest", "other"), ("codec", "none"), ("versions", {})):
        header.write_text(json.dumps(edited | {"attributes": {"kava": edited["attributes"]["kava"] | {field: value}}}))
        with pytest.raises(StoreError, match="was edited"):
            KVStore.open(store.path)
    fields = edited["attributes"]["kava"] | {"corpus_digest": "other"}
    del fields["digest"]
    header.write_text(json.dumps(edited | {"attributes": {"kava": {**fields, "digest": digest_json(fields)}}}))
    with pytest.raises(StoreError, match="its fingerprint does not match"):
        KVStore.open(store.path)


def test_another_manifest_is_refused_naming_every_field(store: KVStore) -> None:
    other = manifest(
        dtype="float16", tokenizer_digest="x", geometry=KVGeometry(num_layers=3, num_key_value_heads=2, head_dim=4)
    )
    with pytest.raises(ManifestMismatchError) as error:
        KVStore.create(store.path, other)
    for field in ("dtype: 'bfloat16' there, 'float16' now", "tokenizer_digest", "geometry.head_dim: 8 there, 4 now"):
        assert field in str(error.value)
    assert "corpus_digest" not in str(error.value)


def test_fingerprint_is_of_content_only() -> None:
    one = manifest()
    assert one.fingerprint == manifest(codec="none").fingerprint
    assert one.fingerprint == manifest(versions={"torch": "9"}).fingerprint
    assert not one.differences(manifest(versions={"torch": "9"}))
    changes: list[dict[str, Any]] = [{"corpus_digest": "x"}, {"dtype": "float32"}, {"parameters": {"a": 1}}]
    for change in [*changes, {"samples_per_part": 4}, {"extras": EXTRAS}]:
        assert one.fingerprint != manifest(**change).fingerprint
    assert Manifest(**one.model_dump(exclude={"fingerprint"})).fingerprint == one.fingerprint


def test_resume_at_the_first_missing_part(tmp_path: Path) -> None:
    whole, samples = write_store(tmp_path / "whole.zarr", LENGTHS)
    path = tmp_path / "cut.zarr"
    first = KVStore.create(path, manifest())
    with first.write_part(1) as writer:
        for position in range(3):
            writer.append(position, samples[3 + position])
        writer.commit()
    with first.write_part(2) as writer:
        writer.append(0, samples[6])  # Left without commit.
    again = KVStore.create(path, manifest())
    assert again.committed_parts() == [1]
    assert again.missing_parts() == [0, 2]
    with pytest.raises(StoreNotFoundError, match="part 0 is not written yet"):
        again[0]
    for part in again.missing_parts():
        with again.write_part(part) as writer:
            for position, index in enumerate(again.manifest.part_samples(part)):
                writer.append(position, samples[index])
            writer.commit()
    assert tree(path) == tree(whole.path)


def test_a_part_must_be_whole_and_written_once(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest())
    with store.write_part(0) as writer:
        writer.append(0, sample(0, 3))
        with pytest.raises(StoreError, match="written twice"):
            writer.append(0, sample(0, 3))
        with pytest.raises(StoreError, match="no position 3"):
            writer.append(3, sample(0, 3))
        with pytest.raises(StoreError, match=r"positions \[1, 2\] were not written"):
            writer.commit()
    assert store.committed_parts() == []
    assert not list((tmp_path / "s.zarr/parts").glob(".tmp*"))


def test_two_writers_of_one_part(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest(1, 1))
    one, two = store.write_part(0), store.write_part(0)
    for number, writer in enumerate((one, two)):
        writer.append(0, sample(number, 3))
    one.commit()
    with pytest.raises(PartExistsError, match="another process"):
        two.commit()
    two.abort()
    assert store.verify() == []


def test_wrong_geometry_is_refused(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest())
    wrong = sample(0, 3, geometry=KVGeometry(num_layers=3, num_key_value_heads=12, head_dim=8))
    with (
        store.write_part(0) as writer,
        pytest.raises(StoreError, match=r"shape \(3, 3, 12, 8\), the store holds \(3, 3, 2, 8\)"),
    ):
        writer.append(0, wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_non_finite_samples_are_recorded_never_written(tmp_path: Path, bad: float) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest(2, 2, dtype="bfloat16"))
    broken = sample(0, 5)
    assert broken.values is not None
    broken.values[4, 1, 0, 3] = bad
    broken.mask[4] = False
    with store.write_part(0) as writer:
        writer.append(0, broken)
        writer.append(1, sample(1, 4))
        writer.commit()
    assert store.failed == {"sample-0": "non-finite values in layers [1]"}
    with pytest.raises(SampleFailedError, match=r"sample-0.*non-finite values"):
        store[0]
    assert store.indices() == [1]
    assert torch.isfinite(torch.from_numpy(store.values.compute())).all()
    assert store.verify() == []


def test_float16_overflow_is_a_failed_sample(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest(1, 1, dtype="float16"))
    big = sample(0, 2)
    assert big.keys is not None
    big.keys[0, 2, 0, 0] = 70000.0
    with store.write_part(0) as writer:
        writer.append(0, big)
        writer.commit()
    assert store.failed == {"sample-0": "non-finite keys in layers [2]"}


def _data_files(root: Path) -> Iterator[Path]:
    return (p for p in sorted((root / "parts").rglob("*")) if p.is_file())


def test_verify_finds_one_flipped_bit_in_any_file(store: KVStore) -> None:
    rng = np.random.default_rng(0)
    for path in _data_files(store.path):
        if path.parent == store.path / "parts":
            continue  # The group of parts itself holds nothing.
        good = path.read_bytes()
        at = int(rng.integers(len(good)))
        flip(path, at, int(rng.integers(8)))
        part, array = path.relative_to(store.path / "parts").parts[:2]
        found = KVStore.open(store.path).verify()
        assert [d.part for d in found] == [int(part)] * len(found), path
        assert found, path
        assert {d.array for d in found} == {array}, path
        overwrite(path, good)
    assert KVStore.open(store.path).verify() == []


def test_verify_names_the_chunk_and_its_sample(store: KVStore) -> None:
    path = store.path / "parts/00001/keys/c/0/0/0/0"
    flip(path, store.part(1).pages["keys"].offset(2) + 20, 2)
    (damage,) = KVStore.open(store.path).verify()
    assert (damage.part, damage.array, damage.chunk, damage.sample_ids) == (1, "keys", 2, ("sample-4",))
    assert "checksum mismatch" in str(damage)
    with pytest.raises(DamagedStoreError, match="chunk 2: checksum mismatch"):
        KVStore.open(store.path)[4]
    assert KVStore.open(store.path)[3].sample_id == "sample-3"


@pytest.mark.parametrize("how", ["truncate", "remove", "swap", "extra"])
def test_missing_truncated_and_exchanged_parts_are_noticed(store: KVStore, tmp_path: Path, how: str) -> None:
    part = store.path / "parts/00000"
    shard = part / "keys/c/0/0/0/0"
    if how == "truncate":
        overwrite(shard, shard.read_bytes()[:-7])
    elif how == "remove":
        shard.unlink()
    elif how == "extra":
        (part / "keys/c/1").mkdir()
        (part / "keys/c/1/0").write_bytes(b"x")
    else:
        other, _ = write_store(tmp_path / "other.zarr", LENGTHS, corpus_digest="other")
        for path in (other.path / "parts/00000").rglob("*"):
            if path.is_file():
                overwrite(part / path.relative_to(other.path / "parts/00000"), path.read_bytes())
    again = KVStore.open(store.path)
    assert [d.part for d in again.verify()] == [0]
    if how != "extra":
        with pytest.raises(DamagedStoreError, match="00000"):
            again[0]
    assert again[3].sample_id == "sample-3"


def test_background_writer_writes_the_same_bits(tmp_path: Path) -> None:
    plain, samples = write_store(tmp_path / "plain.zarr", LENGTHS)
    store = KVStore.create(tmp_path / "threaded.zarr", manifest())
    committed: list[int] = []
    with BackgroundWriter(store, on_commit=committed.append, queue_bytes=1) as writer:
        for part in range(3):
            writer.begin(part)
            for position, index in enumerate(store.manifest.part_samples(part)):
                writer.append(position, samples[index])
            writer.commit()
    assert committed == [0, 1, 2]
    assert tree(store.path) == tree(plain.path)


def test_background_writer_hands_its_error_to_the_caller(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest())
    wrong = dataclasses.replace(sample(0, 3), keys=torch.zeros(3, 1, 2, 8))

    def write() -> None:
        with BackgroundWriter(store, queue_bytes=1) as writer:
            writer.begin(0)
            for _ in range(100):
                writer.append(0, wrong)

    with pytest.raises(StoreError, match="the store holds"):
        write()
    assert not list((tmp_path / "s.zarr/parts").glob(".tmp*"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_after_the_parent_has(store: KVStore, method: str) -> None:
    wanted = float(store[2].keys.float().sum())  # type: ignore[union-attr]
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    target, argument = (read_open, store) if method == "fork" else (read_path, str(store.path))
    process = context.Process(target=target, args=(argument, queue))
    process.start()
    assert queue.get(timeout=120) == wanted
    process.join()


def test_page_size() -> None:
    smollm2 = KVGeometry(num_layers=30, num_key_value_heads=3, head_dim=64)
    assert default_page_tokens(smollm2, 2) == 64
    assert default_page_tokens(KVGeometry(num_layers=28, num_key_value_heads=4, head_dim=128), 2) == 32
    assert default_page_tokens(KVGeometry(num_layers=80, num_key_value_heads=64, head_dim=128), 4) == 1


def test_a_dask_array_of_a_rewritten_part_is_refused(store: KVStore) -> None:
    keys = store.keys
    store.drop_part(0)
    with store.write_part(0) as writer:
        for position, length in enumerate(LENGTHS[:3]):
            writer.append(position, sample(position + 50, length, extras=EXTRAS))
        writer.commit()
    with pytest.raises(StoreError, match="was rewritten"):
        keys.compute()
