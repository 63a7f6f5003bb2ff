"""Controls: the same samples, tokens and masks as the true targets, and other keys and values for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.stores import write_store

from kava.store import KVSample, KVStore, Split
from kava.train.controls import TARGETS, RandomTargets, ShuffledTargets, TokenShuffledTargets

LENGTHS = [9, 14, 6, 11, 8, 17, 5, 12, 10, 1, 7]
CONTROLS = [name for name in TARGETS if name != "true"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KVStore:
    store: KVStore = write_store(tmp_path_factory.mktemp("t") / "t.zarr", LENGTHS, kind="target", dtype="float32")[0]
    return store


def tensors(sample: KVSample) -> tuple[torch.Tensor, torch.Tensor]:
    assert sample.keys is not None
    assert sample.values is not None
    return sample.keys, sample.values


@pytest.mark.parametrize("name", CONTROLS)
def test_all_but_the_numbers_of_training_is_the_same(store: KVStore, name: str) -> None:
    control = TARGETS[name](store, 0)
    assert control.indices(Split.TRAIN) == store.indices(Split.TRAIN)
    assert control.manifest.fingerprint == store.manifest.fingerprint
    for index in store.indices():
        true, made, again = store.sample(index), control.sample(index), TARGETS[name](store, 0).sample(index)
        assert (made.sample_id, made.split, len(made)) == (true.sample_id, true.split, len(true))
        for field in ("input_ids", "positions", "spans", "segments", "mask"):
            np.testing.assert_array_equal(getattr(made, field), getattr(true, field))
        for ours, theirs, other in zip(tensors(made), tensors(true), tensors(again), strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, other)
            if true.split is Split.HELDOUT:
                assert torch.equal(ours, theirs)
            elif true.mask.sum() > 1:
                assert not torch.equal(ours[true.mask], theirs[true.mask])


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_not_asked_for_is_not_there_and_changes_nothing(store: KVStore, name: str) -> None:
    control = TARGETS[name](store, 0)
    index = store.indices(Split.TRAIN)[0]
    keys, values = tensors(control.sample(index))
    alone, neither = control.sample(index, values=False), control.sample(index, keys=False, values=False)
    assert alone.values is None
    assert alone.keys is not None
    assert torch.equal(alone.keys, keys)
    assert neither.keys is None
    second = control.sample(index, keys=False).values
    assert second is not None
    assert torch.equal(second, values)


def test_shuffled_takes_another_samples_rows_in_order(store: KVStore) -> None:
    control = ShuffledTargets(store)
    train = store.indices(Split.TRAIN)
    assert sorted(control.partner) == sorted(control.partner.values()) == train
    assert all(index != other for index, other in control.partner.items())
    for index in train:
        own, other = store.sample(index), store.sample(control.partner[index])
        rows = [row for row in range(len(other)) if other.mask[row]]
        for made, from_other in zip(tensors(control.sample(index)), tensors(other), strict=True):
            for number, row in enumerate(np.flatnonzero(own.mask)):
                assert torch.equal(made[row], from_other[rows[number % len(rows)]])


def test_another_seed_shuffles_otherwise(store: KVStore) -> None:
    assert ShuffledTargets(store, 1).partner != ShuffledTargets(store, 2).partner


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_shuffled_among_themselves_and_none_keeps_its_own(store: KVStore, seed: int) -> None:
    for index in store.indices(Split.TRAIN):
        true, made = store.sample(index), TokenShuffledTargets(store, seed).sample(index)
        for ours, theirs in zip(tensors(made), tensors(true), strict=True):
            own = list(map(tuple, theirs[true.mask].flatten(1).tolist()))
            given = list(map(tuple, ours[true.mask].flatten(1).tolist()))
            assert sorted(given) == sorted(own)
            assert len(own) < 2 or all(one != other for one, other in zip(given, own, strict=True))


def test_random_targets_have_the_moments_of_each_layer(tmp_path: Path) -> None:
    store = write_store(tmp_path / "t.zarr", [300, 300, 5], kind="target", dtype="float32", page_tokens=64)[0]
    made = RandomTargets(store)
    drawn = [tensors(made.sample(index)) for index in (0, 1)]
    for number, name in enumerate(("keys", "values")):
        rows = torch.cat([sample[number] for sample in drawn]).double()
        for layer in range(store.geometry.num_layers):
            mean, std = (store.statistics()[f"{name}_{of}"][layer] for of in ("mean", "std"))
            assert float(rows[:, layer].mean()) == pytest.approx(mean, abs=0.05)
            assert float(rows[:, layer].std()) == pytest.approx(std, rel=0.03)
    assert not torch.equal(drawn[0][0], drawn[1][0])
