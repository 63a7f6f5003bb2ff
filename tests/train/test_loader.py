"""Batches that threads and processes read ahead: the right numbers, bounded memory, and nothing left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.stores import flip, write_store
from fixtures.targets import write_targets

from kava.errors import DamagedStoreError
from kava.pipeline.fuse.fusion import fused_manifest, measure_fusion
from kava.pipeline.fuse.rules import Weighting
from kava.pipeline.fuse.view import FusedTargets
from kava.store import KVStore, Split
from kava.train import TargetCollator, TargetDataset
from kava.train.feed import TrainingRows
from kava.train.loader import Batches, ProcessLoader, ThreadedLoader
from kava.train.order import Order

LENGTHS = [9, 14, 6, 11, 8, 17, 5, 12, 10, 4, 7, 13]
COLLATOR = TargetCollator(0, ("prompt", "rationale", "answer"))


@pytest.fixture
def store(tmp_path: Path) -> KVStore:
    made: KVStore = write_store(tmp_path / "t.zarr", LENGTHS, kind="target")[0]
    return made


def _batches(store: Any, count: int = 9, size: int = 3, *, pack_tokens: int | None = None, **what: Any) -> Batches:
    dataset = TargetDataset(store, Split.TRAIN, **what)
    order = Order(dataset.lengths, dataset.parts, seed=0, pack_tokens=pack_tokens)
    return Batches(dataset, COLLATOR, TrainingRows(order, size, rank=0, ranks=1), count)


def _copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}


def _same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name], name


def _readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kava-read")]


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_store_s(store: KVStore, threads: int) -> None:
    """Against samples that the store reads and pads itself; each batch is looked at after the next ones were begun."""
    batches = _batches(store)
    loader = ThreadedLoader(batches, threads=threads, ahead=2, pin=False)
    for number in range(9):
        (batch,) = loader.take(1)
        indices = [batches.dataset.indices[item] for (item,) in batches.rows(number)]
        wanted = store.batch(indices)
        assert batch["sample_ids"] == wanted.sample_ids
        for name, other in (("input_ids", "input_ids"), ("attention_mask", "attention_mask"), ("kv_mask", "mask")):
            assert torch.equal(batch[name], getattr(wanted, other))
        for name in ("keys", "values"):
            assert torch.equal(batch[name], getattr(wanted, name))
        assert batch["num_tokens"] == int(wanted.attention_mask.sum())
        assert batch["text_bytes"] == sum(
            int((s.spans[:, 1] - s.spans[:, 0]).sum()) for s in map(store.sample, indices)
        )
        _same(batch, COLLATOR([store[index] for index in indices]))
    assert loader.take(1) == []
    loader.close()
    assert not _readers()


def test_packed_rows_hold_whole_samples(store: KVStore) -> None:
    batches = _batches(store, pack_tokens=30)
    loader = ThreadedLoader(batches, first=2, threads=2, ahead=2, pin=False)
    shared = 0
    for number in range(2, 9):
        (batch,) = loader.take(1)
        seen: list[str] = []
        for row, items in enumerate(batches.rows(number)):
            start = 0
            for item in items:
                sample = store[batches.dataset.indices[item]]
                here = (row, slice(start, start + len(sample)))
                for name in ("keys", "values"):
                    assert torch.equal(batch[name][here], getattr(sample, name))
                assert batch["input_ids"][here].tolist() == sample.input_ids.tolist()
                assert batch["position_ids"][here].tolist() == list(range(len(sample)))
                assert set(batch["sample_numbers"][here].tolist()) == {len(seen)}
                assert batch["labels"][row, start] == -100
                seen.append(sample.sample_id)
                start += len(sample)
            rest = (row, slice(start, None))
            assert not batch["keys"][rest].any()
            assert not batch["kv_mask"][rest].any()
            assert set(batch["labels"][rest].tolist()) <= {-100}
            assert set(batch["sample_numbers"][rest].tolist()) <= {-1}
            shared += len(items) > 1
        assert batch["sample_ids"] == seen
        assert "attention_mask" not in batch
    assert shared > 3
    loader.close()


def test_only_what_the_loss_looks_at(store: KVStore) -> None:
    whole, some = _batches(store), _batches(store, names=("keys",), layers=(2, 0))
    for number in range(3):
        batch = some[number]
        assert "values" not in batch
        assert torch.equal(batch["keys"], whole[number]["keys"][:, :, [2, 0]])
    assert not {"keys", "values"} & _batches(store, names=())[0].keys()


def test_targets_that_are_fused_as_they_are_read(tmp_path: Path) -> None:
    stores = {f"t{n}": write_targets(tmp_path, LENGTHS, n, failed=[1] if n else []) for n in range(2)}
    manifest = fused_manifest({name: made.manifest for name, made in stores.items()}, Weighting(), "calibration")
    view = FusedTargets(tmp_path / "f.json", stores, measure_fusion(stores, manifest, Weighting(), range(12)))
    assert view.lengths.tolist() == LENGTHS
    batches = _batches(view, layers=(1, 2))
    loader = ThreadedLoader(batches, threads=2, ahead=2, pin=False)
    for number in range(5):
        (batch,) = loader.take(1)
        wanted = [view[batches.dataset.indices[item]] for (item,) in batches.rows(number)]
        for row, sample in enumerate(wanted):
            assert sample.keys is not None
            assert torch.equal(batch["keys"][row, : len(sample)], sample.keys[:, [1, 2]])
    loader.close()


def test_memory_is_that_of_a_few_batches_however_slow_the_training_is(store: KVStore) -> None:
    loader = ThreadedLoader(_batches(store, count=40), threads=2, ahead=2, pin=False)
    places = set()
    for number in range(10):
        one, two = loader.take(2)
        kept = _copied(one), _copied(two)
        if number % 4 == 0:
            time.sleep(0.05)
        # What is in use is not written to, whatever is read meanwhile.
        _same(one, kept[0])
        _same(two, kept[1])
        places |= {one["keys"].data_ptr(), two["keys"].data_ptr()}
        assert len(loader._pending) <= 2
    assert len(loader._free) + len(loader._used) + len(loader._pending) == 4
    # Buffers grow to the largest batch, and are then always the same four.
    assert len(places) <= 16
    loader.close()


def test_nothing_is_read_before_it_is_asked_for_or_after_the_end(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = TargetDataset.read

    def noted(self: TargetDataset, item: int, into: Any) -> Any:
        read.append(item)
        return plain(self, item, into)

    monkeypatch.setattr(TargetDataset, "read", noted)
    batches = _batches(store, count=20)
    loader = ThreadedLoader(batches, first=11, threads=2, ahead=3, pin=False)
    assert read == []
    loader.take(1)
    loader.close()  # Early: what is not begun is not read.
    assert not _readers()
    assert len(read) <= 4 * 3
    assert read[:2] != []
    asked = [item for number in range(11, 15) for (item,) in batches.rows(number)]
    assert sorted(read) == sorted(asked[: len(read)])


@pytest.mark.parametrize("workers", [False, True])
def test_a_fault_is_told_where_its_batch_is_taken(store: KVStore, workers: bool) -> None:
    shard = next((store.path / "parts/00001/keys/c").rglob("0"))
    flip(next(p for p in [shard, *shard.rglob("*")] if p.is_file()), 40)
    batches = _batches(KVStore.open(store.path))
    index = next(i for i in range(3, 6) if _damaged(store, i))
    item = batches.dataset.indices.tolist().index(index)
    number = next(n for n in range(9) if (item,) in batches.rows(n))
    loader: Any = (
        ProcessLoader(batches, workers=1) if workers else ThreadedLoader(batches, threads=2, ahead=4, pin=False)
    )
    for _ in range(number):
        assert loader.take(1)
    with pytest.raises(DamagedStoreError, match=rf"^sample {index}: .*parts/00001/keys.*: chunk"):
        loader.take(1)
    loader.close()
    assert not _readers()


def _damaged(store: KVStore, index: int) -> bool:
    try:
        KVStore.open(store.path).sample(index)
    except DamagedStoreError:
        return True
    return False


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_read_the_same(store: KVStore, how: str) -> None:
    """Also of a store that this process has read from on threads before."""
    batches = _batches(store, pack_tokens=30)
    threads = ThreadedLoader(batches, first=1, threads=2, ahead=2, pin=False)
    before = torch.get_rng_state()
    processes = ProcessLoader(batches, first=1, workers=2, multiprocessing_context=how)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(4):
        for one, two in zip(threads.take(2), processes.take(2), strict=True):
            _same(one, two)
    assert threads.take(1) == processes.take(1) == []
    threads.close()
    processes.close()
