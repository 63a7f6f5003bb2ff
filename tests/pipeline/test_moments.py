"""Streamed sums against plain statistics, and linear CKA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.pairs import geometry, pairs, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.pipeline.maps.moments import Calibration, Gram, Moments, Wanted, is_held_out

SOURCE, TARGET = geometry(4, 2, 3), geometry(3, 2, 2)
LAYERS = [[0], [3, 1], [2, 2]]


def _moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    one, two = geometry(1, 1, x.shape[1]), geometry(1, 1, y.shape[1])
    gram = Gram(one, two, Wanted.for_map([[0]]))
    gram.add(x[:, None], y[:, None])
    return gram.moments([0], 0)


@pytest.mark.parametrize("wanted", [Wanted.for_map(LAYERS), Wanted.for_search(SOURCE, TARGET)], ids=["map", "search"])
def test_blocks_are_plain_covariances(wanted: Wanted) -> None:
    x, y = torch.randn(101, 4, 6) + 5, torch.randn(101, 3, 4) - 3
    gram = Gram(SOURCE, TARGET, wanted)
    for first in range(0, 101, 17):
        gram.add(x[first : first + 17], y[first : first + 17])
    for target, sources in enumerate(LAYERS):
        joined = torch.cat([*(x[:, layer] for layer in sources), y[:, target]], dim=1).double()
        covariance, width = torch.cov(joined.T, correction=0), 6 * len(sources)
        found = gram.moments(sources, target)
        assert found.count == 101
        torch.testing.assert_close(torch.cat([found.mean_x, found.mean_y]), joined.mean(0))
        torch.testing.assert_close(found.cov_xx, covariance[:width, :width])
        torch.testing.assert_close(found.cov_xy, covariance[:width, width:])
        torch.testing.assert_close(found.cov_yy, covariance[width:, width:])
        numbers, columns = torch.tensor([1, 4]), torch.tensor([2])
        block = found.block(numbers, columns)
        torch.testing.assert_close(block.cov_xy, covariance[:width, width:][numbers][:, columns])


def test_only_the_wanted_blocks_are_kept() -> None:
    def sizes(wanted: Wanted) -> int:
        gram = Gram(SOURCE, TARGET, wanted)
        return sum(t.numel() for t in [*gram._xx.values(), *gram._xy.values()])

    assert sizes(Wanted.for_map([[0], [1], [3]])) == 3 * 36 + 3 * 24
    assert sizes(Wanted.for_map(LAYERS)) == (1 + 3 + 1) * 36 + (1 + 2 + 1) * 24
    assert sizes(Wanted.for_cka(SOURCE, TARGET)) == 4 * 36 + 12 * 24
    assert sizes(Wanted.for_search(SOURCE, TARGET)) == 10 * 36 + 12 * 24


def test_every_fifth_sample_is_held_out() -> None:
    assert [n for n in range(12) if is_held_out(n)] == [1, 6, 11]
    found = pairs(SOURCE, TARGET, tokens=7, samples=7)
    calibration = Calibration.gather(SOURCE, TARGET, Wanted.for_map(LAYERS), iter(found))
    assert calibration.samples == {"fit": 5, "heldout": 2}
    assert calibration.tokens == {"fit": 35, "heldout": 14}
    fitted, held = calibration.moments("values", [3, 1], 1)
    assert held is not None
    for moments, heldout in ((fitted, False), (held, True)):
        x = rows(found, 1, heldout=heldout)
        torch.testing.assert_close(moments.mean_x, torch.cat([x[:, 3], x[:, 1]], dim=1).mean(0))
    alone = Calibration.gather(SOURCE, TARGET, Wanted.for_map(LAYERS), found[:1])
    assert alone.moments("keys", [0], 0)[1] is None
    with pytest.raises(AlignmentError, match="fitted against the student's own keys and values"):
        Calibration.gather(SOURCE, TARGET, Wanted.for_map(LAYERS), [(found[0][0], None)])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 1000))
def test_r2_from_moments_is_r2_of_rows(p: int, q: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, weight = (torch.randn(s, generator=generator).double() for s in ((40, p), (40, q), (p, q)))
    x, y, bias = x * 3 - 7, y + 2, torch.randn(q, generator=generator).double()
    error = (x @ weight + bias - y).square().sum()
    wanted = float(1 - error / (y - y.mean(0)).square().sum())
    assert _moments(x, y).r2(weight, bias) == pytest.approx(wanted, rel=1e-9)
    shifted = _moments(x, y).with_y(y.mean(0), 0.5).r2(weight, bias)
    error = (x @ weight + bias - (y - y.mean(0)) / 2).square().sum()
    assert shifted == pytest.approx(float(1 - error / ((y - y.mean(0)) / 2).square().sum()), rel=1e-9)


def test_r2_of_what_does_not_vary_is_not_a_number_to_have() -> None:
    moments = _moments(torch.randn(9, 2), torch.ones(9, 2))
    assert moments.r2(torch.zeros(2, 2).double(), torch.ones(2).double()) is None
    assert moments.cka == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.01, 100), st.integers(0, 1000))
def test_cka_is_one_with_itself_and_ignores_rotation_scale_and_shift(p: int, q: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(60, width, generator=generator).double() for width in (p, q))
    rotation, _ = torch.linalg.qr(torch.randn(p, p, generator=generator).double())
    assert _moments(x, x).cka == pytest.approx(1)
    assert _moments(x, scale * x @ rotation + 3).cka == pytest.approx(1)
    assert _moments(scale * x @ rotation - 5, y).cka == pytest.approx(_moments(x, y).cka)
    assert _moments(x, y).cka == pytest.approx(_moments(y, x).cka)


def test_cka_by_the_gram_matrices_of_rows() -> None:
    """The definition on `[n, n]` kernels, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = x xᵀ, in numpy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 7)) + 4
    y = x[:, :5] @ rng.normal(size=(5, 5)) + rng.normal(size=(50, 5))
    centre = np.eye(50) - 1 / 50
    one, two = (centre @ (z @ z.T) @ centre for z in (x, y))
    wanted = (one * two).sum() / np.sqrt((one * one).sum() * (two * two).sum())
    assert _moments(torch.from_numpy(x), torch.from_numpy(y)).cka == pytest.approx(wanted, rel=1e-10)


def test_cka_of_unrelated_sides_falls_to_zero_with_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        _moments(*(torch.randn(n, 32, generator=generator).double() for _ in range(2))).cka for n in (200, 2000, 20000)
    ]
    assert found[0] == pytest.approx(32 / 200, rel=0.4), "the plain estimator's bias is about p / n"
    assert found[1] < 0.03
    assert found[2] < 0.003
