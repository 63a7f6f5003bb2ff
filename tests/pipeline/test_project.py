from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.pipeline.heads import HEAD_MAPS
from kava.pipeline.layers import explicit, layer_map, uniform
from kava.pipeline.moments import Moments
from kava.pipeline.project import Projector, fit_projector
from kava.pipeline.resample import RESAMPLERS
from kava.store import KVGeometry

FITTED = [name for name in HEAD_MAPS if name != "identity"]


def _geometry(layers: int, heads: int, dim: int) -> KVGeometry:
    return KVGeometry(num_layers=layers, num_key_value_heads=heads, head_dim=dim)


def _pairs(
    source: KVGeometry, target: KVGeometry, tokens: int = 300, seed: int = 0
) -> list[tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 3, source.width).view(source.shape[1:])

    def draw(geometry: KVGeometry) -> torch.Tensor:
        return torch.randn((tokens // 2, *geometry.shape), generator=generator)

    return [((draw(source) * scale + 1, draw(source)), (draw(target) - 2, draw(target) * 3)) for _ in range(2)]


def _fit(source: KVGeometry, target: KVGeometry, heads: str) -> Projector:
    layers = uniform(source.num_layers, target.num_layers)
    return fit_projector(source, target, layers, heads=heads, pairs=_pairs(source, target))  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", FITTED)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((4, 12, 128), (4, 2, 128)),  # the earlier project's first crash
        ((3, 28, 128), (3, 2, 64)),
        ((30, 3, 64), (6, 4, 32)),
        ((2, 2, 8), (5, 4, 16)),  # deeper, more heads, wider
        ((3, 3, 8), (3, 2, 8)),
        ((3, 1, 8), (1, 3, 4)),
    ],
)
def test_any_geometry_onto_any_other(heads: str, source: tuple[int, ...], target: tuple[int, ...]) -> None:
    if heads in ("pca", "procrustes") and source[1] * source[2] > 2000:
        source = (source[0], source[1] // 4, source[2] // 4)
    one, two = _geometry(*source), _geometry(*target)
    projector = _fit(one, two, heads)
    out = projector.apply("keys", torch.randn(50, *one.shape))
    assert out.shape == (50, *two.shape)
    assert torch.isfinite(out).all()
    spread = out.flatten(2).std(0)
    assert (spread > 1e-3).all(), "every number of every layer varies"


def test_mean_by_hand() -> None:
    one, two = _geometry(1, 12, 4), _geometry(1, 2, 4)
    x = torch.randn(5, 1, 12, 4)
    out = _fit(one, two, "mean").apply("values", x)
    torch.testing.assert_close(out[:, 0, 0], x[:, 0, :6].mean(1))
    torch.testing.assert_close(out[:, 0, 1], x[:, 0, 6:].mean(1))
    up = _fit(_geometry(1, 2, 4), _geometry(1, 6, 4), "mean").apply("values", x[:, :, :2])
    torch.testing.assert_close(up, x[:, :, :2].repeat_interleave(3, dim=2))


def test_identity_needs_equal_heads() -> None:
    one = _geometry(4, 2, 8)
    x = torch.randn(7, *one.shape)
    same = fit_projector(one, _geometry(2, 2, 8), [[0], [3]], heads="identity")
    assert torch.equal(same.apply("keys", x), x[:, [0, 3]])
    with pytest.raises(AlignmentError, match="identity needs equal heads"):
        fit_projector(one, _geometry(2, 4, 4), [[0], [3]], heads="identity")


@pytest.mark.parametrize("shape", [((2, 3, 8), (2, 2, 4)), ((2, 1, 4), (2, 3, 8))])
def test_random_is_orthonormal_and_seeded(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    one, two = _geometry(*shape[0]), _geometry(*shape[1])
    a, b = (fit_projector(one, two, [[0], [1]], heads="random", seed=s) for s in (0, 1))
    again = fit_projector(one, two, [[0], [1]], heads="random", seed=0)
    weight = a.weights["keys"][0]
    small = weight.T @ weight if one.width > two.width else weight @ weight.T
    torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-6, rtol=0)
    assert torch.equal(weight, again.weights["keys"][0])
    assert not torch.equal(weight, b.weights["keys"][0])
    assert not torch.equal(weight, a.weights["values"][0])


def test_pca_keeps_what_varies_most() -> None:
    one, two = _geometry(1, 2, 16), _geometry(1, 1, 8)
    pairs = _pairs(one, two, tokens=2000)
    projector = fit_projector(one, two, [[0]], heads="pca", pairs=pairs)  # type: ignore[arg-type]
    x = torch.cat([p[0][0] for p in pairs]).flatten(1).double()
    centred = x - x.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    overlap = torch.linalg.svdvals(vh[:8] @ projector.weights["keys"][0].double())
    torch.testing.assert_close(overlap, torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    share = float((s[:8] ** 2).sum() / (s**2).sum())
    assert projector.card["diagnostics"]["keys"][0]["explained_variance"] == pytest.approx(share, abs=1e-5)


def test_procrustes_finds_a_rotation_with_scale_and_shift() -> None:
    one = two = _geometry(1, 2, 6)
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    x = torch.randn(500, 12, generator=generator) * torch.linspace(0.5, 2, 12)
    y = 0.25 * x @ rotation + 4
    shaped = [t.view(500, 1, 2, 6) for t in (x, y)]
    pair = ((shaped[0], shaped[0]), (shaped[1], shaped[1]))
    projector = fit_projector(one, two, [[0]], heads="procrustes", pairs=[pair])
    torch.testing.assert_close(projector.apply("keys", shaped[0]), shaped[1], atol=1e-4, rtol=1e-4)
    assert projector.card["diagnostics"]["keys"][0]["r2"] == pytest.approx(1, abs=1e-5)


def test_procrustes_keeps_the_students_mean_and_variance() -> None:
    one, two = _geometry(2, 3, 8), _geometry(2, 2, 6)
    pairs = _pairs(one, two, tokens=4000)
    projector = fit_projector(one, two, [[0], [1]], heads="procrustes", pairs=pairs)  # type: ignore[arg-type]
    for number, name in enumerate(("keys", "values")):
        made = projector.apply(name, torch.cat([p[0][number] for p in pairs])).flatten(2)
        own = torch.cat([p[1][number] for p in pairs]).flatten(2)
        torch.testing.assert_close(made.mean(0), own.mean(0), atol=1e-3, rtol=0)
        torch.testing.assert_close(made.var(0).sum(-1), own.var(0).sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("heads", FITTED)
def test_unit_scale_is_mean_zero_and_variance_one(heads: str) -> None:
    one, two = _geometry(3, 3, 8), _geometry(2, 2, 6)
    pairs = _pairs(one, two, tokens=4000)
    projector = fit_projector(one, two, [[0], [2]], heads=heads, scale="unit", pairs=pairs)  # type: ignore[arg-type]
    for number, name in enumerate(("keys", "values")):
        made = projector.apply(name, torch.cat([p[0][number] for p in pairs])).flatten(2)
        torch.testing.assert_close(made.mean(0), torch.zeros(2, 12), atol=1e-3, rtol=0)
        torch.testing.assert_close(made.var(0).mean(-1), torch.ones(2), rtol=1e-3, atol=0)


def test_no_calibration_is_an_error() -> None:
    with pytest.raises(AlignmentError, match="no calibration tokens"):
        fit_projector(_geometry(1, 1, 4), _geometry(1, 1, 4), [[0]], heads="pca")


def test_wrong_geometry_is_an_error() -> None:
    projector = _fit(_geometry(2, 2, 8), _geometry(2, 2, 4), "random")
    with pytest.raises(AlignmentError, match=r"made for 2 layers x 2 KV heads x 8, got \(2, 12, 8\)"):
        projector.apply("keys", torch.zeros(3, 2, 12, 8))


@pytest.mark.parametrize("heads", FITTED)
def test_saved_and_loaded(tmp_path: Path, heads: str) -> None:
    projector = _fit(_geometry(4, 2, 8), _geometry(2, 3, 4), heads)
    projector.save(tmp_path / "p.safetensors")
    again = Projector.load(tmp_path / "p.safetensors")
    x = torch.randn(9, 4, 2, 8)
    for name in ("keys", "values"):
        assert torch.equal(projector.apply(name, x), again.apply(name, x))
    assert again.card == projector.card
    assert (tmp_path / "p.json").is_file()


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 8])),
    target=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 8])),
    heads=st.sampled_from(FITTED),
    method=st.sampled_from(sorted(RESAMPLERS)),
    cuts=st.tuples(
        st.lists(st.integers(1, 39), min_size=1, max_size=20), st.lists(st.integers(1, 39), min_size=1, max_size=20)
    ),
)
def test_resample_and_project_commute(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    heads: str,
    method: str,
    cuts: tuple[list[int], list[int]],
) -> None:
    one, two = _geometry(*source), _geometry(*target)
    projector = _fit(one, two, heads)
    spans = []
    for cut in cuts:
        ends = [*sorted(set(cut)), 40]
        spans.append(np.stack([[0, *ends[:-1]], ends], axis=1).astype(np.int32))
    time = RESAMPLERS[method](*spans)
    x = torch.randn((len(spans[0]), *one.shape), generator=torch.Generator().manual_seed(len(cuts[0])))
    kept = torch.from_numpy(time.mask)
    first = projector.apply("keys", time.apply(x))[kept]
    second = time.apply(projector.apply("keys", x))[kept]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_moments_stream() -> None:
    x, y = torch.randn(100, 5), torch.randn(100, 3)
    moments = Moments.zeros(5, 3)
    for rows in (torch.arange(first, min(first + 17, 100)) for first in range(0, 100, 17)):
        moments.add(x[rows], y[rows])
    joined = torch.cat([x, y], dim=1).double()
    covariance = torch.cov(joined.T, correction=0)
    torch.testing.assert_close(moments.cov_xx, covariance[:5, :5])
    torch.testing.assert_close(moments.cov_xy, covariance[:5, 5:])
    torch.testing.assert_close(moments.cov_yy, covariance[5:, 5:])


@given(st.integers(1, 90), st.integers(1, 90))
def test_uniform_layers(source: int, target: int) -> None:
    found = [layer for (layer,) in uniform(source, target)]
    assert found[-1] == source - 1
    assert target == 1 or found[0] == 0
    assert found == sorted(found)
    assert all(abs(layer - i * (source - 1) / max(target - 1, 1)) <= 0.5 for i, layer in enumerate(found) if target > 1)
    if source == target:
        assert found == list(range(source))


def test_explicit_layers() -> None:
    assert explicit([0, [1, 2], -1], 5, 3) == [[0], [1, 2], [4]]
    assert layer_map("uniform", 28, 22)[21] == [27]
    with pytest.raises(AlignmentError, match="lists 2 layers, the student has 3"):
        explicit([0, 1], 5, 3)
    with pytest.raises(AlignmentError, match=r"layer 5 is not one of 0\.\.4"):
        explicit([0, 5], 5, 2)
    joined = fit_projector(_geometry(3, 2, 4), _geometry(1, 2, 4), [[0, 2]], heads="mean")
    x = torch.randn(4, 3, 2, 4)
    torch.testing.assert_close(joined.apply("keys", x)[:, 0], (x[:, 0] + x[:, 2]) / 2)
