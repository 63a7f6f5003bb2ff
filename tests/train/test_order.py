"""The order of samples: every one once an epoch, the same for any number of ranks, from any place on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import StageError
from kava.train.order import Order, pack


def _corpus(count: int, seed: int = 0, per_part: int = 7) -> tuple[list[int], list[int]]:
    lengths = np.random.default_rng(seed).integers(1, 40, count).tolist()
    return lengths, [i // per_part for i in range(count)]


KINDS: list[dict[str, Any]] = [{}, {"group": 4}, {"pack_tokens": 64}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 60), seed=st.integers(0, 99), window=st.integers(1, 5), first=st.integers(0, 150))
def test_every_sample_once_an_epoch_and_any_place_is_as_good_to_begin(
    kind: dict[str, Any], count: int, seed: int, window: int, first: int
) -> None:
    lengths, parts = _corpus(count, seed)
    order = Order(lengths, parts, seed=seed, window=window, **kind)
    rows = order.rows(0, first + 120)
    samples = list(itertools.chain.from_iterable(rows))
    for epoch in range(len(samples) // count):
        assert sorted(samples[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert Order(lengths, parts, seed=seed, window=window, **kind).rows(first, 120) == rows[first:]
    again = Order(lengths, parts, seed=seed, window=window, **kind)
    again.load(order.state(first))
    assert again.rows(first, 120) == rows[first:]
    # Small batches together are the large ones.
    assert [row for n in range(0, 120, 3) for row in order.rows(first + n, 3)] == rows[first:]


def test_going_on_lays_out_no_earlier_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, parts = _corpus(50)
    state = Order(lengths, parts, seed=0, pack_tokens=64).state(1000)
    made: list[int] = []
    order, make = Order(lengths, parts, seed=0, pack_tokens=64), Order._make

    def noted(self: Order, number: int) -> Any:
        made.append(number)
        return make(self, number)

    monkeypatch.setattr(Order, "_make", noted)
    order.load(state)
    order.rows(1000, 3)
    assert state["epoch"] > 10
    assert set(made) <= {state["epoch"], state["epoch"] + 1}
    for other in (Order(lengths[:-1], parts[:-1], seed=0, pack_tokens=64), Order(lengths, parts, seed=1)):
        with pytest.raises(StageError, match="of another order of samples"):
            other.load(state)


def test_epochs_and_seeds_differ() -> None:
    lengths, parts = _corpus(40)
    orders = [Order(lengths, parts, seed=seed).rows(0, 80) for seed in (0, 1)]
    found = [tuple(rows[i : i + 40]) for rows in orders for i in (0, 40)]
    assert len(set(found)) == 4
    order = Order(lengths, parts, seed=0)
    assert [order.epochs(row) for row in (0, 10, 40, 100)] == [0, 0.25, 1, 2.5]


@pytest.mark.parametrize("kind", [{}, {"pack_tokens": 64}], ids=str)
def test_few_parts_are_read_at_a_time(kind: dict[str, Any]) -> None:
    lengths, parts = _corpus(200, per_part=5)
    rows = Order(lengths, parts, seed=3, window=4, **kind).rows(0, 400)
    seen = [parts[sample] for row in rows for sample in row][:200]
    windows = [set(seen[i : i + 20]) for i in range(0, 200, 20)]
    assert all(len(window) == 4 for window in windows)
    assert set.union(*windows) == set(range(40))
    # Inside a window neither part comes after the other.
    assert seen[:20] != sorted(seen[:20], key=seen.index)


def test_batches_of_like_length_stay_whole_over_epochs() -> None:
    """Also where an epoch is no multiple of a batch; one batch an epoch is made of two ends."""
    lengths, parts = _corpus(61)
    orders = {group: Order(lengths, parts, seed=0, group=group).rows(0, 61 * 4) for group in (None, 8)}
    spread = {}
    for group, rows in orders.items():
        batches = [[lengths[row[0]] for row in rows[i : i + 8]] for i in range(0, 61 * 4 - 7, 8)]
        spread[group] = sorted(max(batch) - min(batch) for batch in batches)
    assert spread[None][0] > 20
    assert sum(wide > 10 for wide in spread[8]) <= 4


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), budget=st.integers(50, 120))
def test_rows_are_filled_well(lengths: list[int], budget: int) -> None:
    names = [100 + i for i in range(len(lengths))]
    rows = pack(names, lengths, budget)
    assert sorted(itertools.chain.from_iterable(rows)) == names
    sums = sorted(sum(lengths[name - 100] for name in row) for row in rows)
    assert sums[-1] <= budget
    assert len(rows) <= 11 / 9 * sum(lengths) / budget * 1.5 + 1
    # No two rows would fit into one.
    assert len(sums) == 1 or sums[0] + sums[1] > budget


def test_packing_leaves_little_room() -> None:
    lengths = np.random.default_rng(0).integers(39, 600, 2000).tolist()
    rows = pack(range(2000), lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.99


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(StageError, match=r"train.pack_tokens: 30 is less than the 31 tokens of the longest"):
        Order([4, 31, 9], [0, 0, 1], seed=0, pack_tokens=30)
    with pytest.raises(StageError, match="no training sample"):
        Order([], [], seed=0)
