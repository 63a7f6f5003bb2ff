"""Projectors: any geometry onto any other, what their cards say, and that they commute with resampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.pairs import geometry, pairs, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.pipeline.maps.heads import HEAD_MAPS
from kava.pipeline.maps.layers import uniform
from kava.pipeline.maps.project import fit_projector
from kava.pipeline.maps.projector import Projector
from kava.pipeline.maps.resample import RESAMPLERS
from kava.store import KVGeometry

FITTED = [name for name in HEAD_MAPS if name != "identity"]
KNOWN = [name for name, method in HEAD_MAPS.items() if method.needs == "nothing" and name != "identity"]
GEOMETRIES = {
    "many heads onto few": ((3, 12, 8), (3, 2, 8)),
    "narrower": ((3, 7, 16), (3, 2, 8)),
    "shallower, more heads": ((8, 3, 8), (3, 4, 4)),
    "deeper, more heads, wider": ((2, 2, 4), (5, 4, 8)),
    "heads that do not divide": ((3, 3, 8), (3, 2, 8)),
    "one head onto three": ((3, 1, 8), (1, 3, 4)),
    "equal": ((2, 2, 8), (2, 2, 8)),
}


def _fit(source: KVGeometry, target: KVGeometry, heads: str, **more: Any) -> Projector:
    layers = uniform(source.num_layers, target.num_layers)
    return fit_projector(source, target, layers, heads=heads, pairs=pairs(source, target), **more)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("scale", ["own", "unit"])
@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("heads", HEAD_MAPS)
def test_every_map_of_any_geometry_onto_any_other(heads: str, per: str, scale: str, name: str, tmp_path: Path) -> None:
    """Shapes, numbers that are finite and vary, diagnostics of held-out rows, saving and loading."""
    if heads == "identity" and name != "equal":
        pytest.skip("identity is for equal geometry")
    one, two = (geometry(*shape) for shape in GEOMETRIES[name])
    projector = _fit(one, two, heads, per=per, scale=scale)
    x = torch.randn(50, *one.shape)
    for kind in ("keys", "values"):
        out = projector.apply(kind, x)
        assert out.shape == (50, *two.shape)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        assert (out.flatten(2).std(0) > 1e-3).all(), "every number of every layer varies"
    assert ("diagnostics" in projector.card) == (heads not in [*KNOWN, "identity"] or scale == "unit")
    for entries in projector.card.get("diagnostics", {}).values():
        assert all(0 < entry["explained_variance"] <= 1 + 1e-9 for entry in entries)
        assert all(("r2" in entry) == (HEAD_MAPS[heads].needs == "student") for entry in entries)
    projector.save(tmp_path / "p.safetensors")
    again = Projector.load(tmp_path / "p.safetensors")
    assert torch.equal(projector.apply("keys", x), again.apply("keys", x))
    assert torch.equal(projector.apply("values", x), again.apply("values", x))
    assert (again.layers, again.source, again.target) == (projector.layers, one, two)
    assert again.card == json.loads(json.dumps(projector.card))
    assert json.loads((tmp_path / "p.json").read_text())["heads"] == heads


@pytest.mark.parametrize("heads", KNOWN)
@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 12, 128), (4, 2, 128)), ((3, 28, 128), (3, 2, 64)), ((30, 3, 64), (6, 4, 32))],
)
def test_real_sizes(heads: str, source: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    one, two = geometry(*source), geometry(*target)
    projector = fit_projector(one, two, uniform(one.num_layers, two.num_layers), heads=heads)
    out = projector.apply("keys", torch.randn(50, *one.shape))
    assert out.shape == (50, *two.shape)
    assert (out.flatten(2).std(0) > 1e-3).all()


@pytest.mark.parametrize("scale", ["own", "unit"])
@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("heads", ["procrustes", "ridge", "cca"])
def test_held_out_r2_is_that_of_held_out_rows(heads: str, per: str, scale: str) -> None:
    one, two = geometry(3, 3, 4), geometry(2, 2, 6)
    found = pairs(one, two, samples=7)
    layers = [[0], [2, 1]]
    projector = fit_projector(one, two, layers, heads=heads, per=per, scale=scale, pairs=found)  # type: ignore[arg-type]
    for kind, name in enumerate(("keys", "values")):
        x = rows(found, kind, heldout=True)
        fitted, own = (rows(found, kind, heldout=h, student=True) for h in (False, True))
        made = projector.apply(name, x.view(-1, *one.shape).float()).flatten(2).double()
        for index, entry in enumerate(projector.card["diagnostics"][name]):
            y, seen = own[:, index], fitted[:, index]
            if scale == "unit":
                y = (y - seen.mean(0)) / (seen - seen.mean(0)).square().mean().sqrt()
            wanted = 1 - (made[:, index] - y).square().sum() / (y - y.mean(0)).square().sum()
            assert entry["r2"] == pytest.approx(float(wanted), abs=1e-5)
    if scale == "own":
        naive = fit_projector(one, two, layers, heads="mean").apply("keys", x.view(-1, *one.shape).float())
        y = rows(found, 1, heldout=True, student=True)
        wanted = 1 - (naive.flatten(2)[:, 1] - y[:, 1]).square().sum() / (y[:, 1] - y[:, 1].mean(0)).square().sum()
        assert projector.card["diagnostics"]["values"][1]["r2_naive"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_fit_does_not_look_at_held_out_samples() -> None:
    one, two = geometry(2, 2, 4), geometry(2, 2, 3)
    found = pairs(one, two, samples=3)
    spoiled = [found[0], pairs(one, two, seed=9)[1], found[2]]
    a, b = (fit_projector(one, two, [[0], [1]], heads="cca", pairs=p) for p in (found, spoiled))
    assert torch.equal(a.weights["keys"][1], b.weights["keys"][1])
    assert a.card["diagnostics"]["keys"][1]["r2"] != b.card["diagnostics"]["keys"][1]["r2"]


def test_mean_by_hand() -> None:
    one, two = geometry(1, 12, 4), geometry(1, 2, 4)
    x = torch.randn(5, 1, 12, 4)
    out = _fit(one, two, "mean").apply("values", x)
    torch.testing.assert_close(out[:, 0, 0], x[:, 0, :6].mean(1))
    torch.testing.assert_close(out[:, 0, 1], x[:, 0, 6:].mean(1))
    up = _fit(geometry(1, 2, 4), geometry(1, 6, 4), "mean").apply("values", x[:, :, :2])
    torch.testing.assert_close(up, x[:, :, :2].repeat_interleave(3, dim=2))


def test_identity_needs_equal_heads() -> None:
    one = geometry(4, 2, 8)
    x = torch.randn(7, *one.shape)
    same = fit_projector(one, geometry(2, 2, 8), [[0], [3]], heads="identity")
    assert torch.equal(same.apply("keys", x), x[:, [0, 3]])
    with pytest.raises(AlignmentError, match="identity needs equal heads"):
        fit_projector(one, geometry(2, 4, 4), [[0], [3]], heads="identity")


@pytest.mark.parametrize("shape", [((2, 3, 8), (2, 2, 4)), ((2, 1, 4), (2, 3, 8))])
def test_random_is_orthonormal_and_seeded(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    one, two = geometry(*shape[0]), geometry(*shape[1])
    a, b = (fit_projector(one, two, [[0], [1]], heads="random", seed=s) for s in (0, 1))
    again = fit_projector(one, two, [[0], [1]], heads="random", seed=0)
    weight = a.weights["keys"][0]
    small = weight.T @ weight if one.width > two.width else weight @ weight.T
    torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-6, rtol=0)
    assert torch.equal(weight, again.weights["keys"][0])
    assert not torch.equal(weight, b.weights["keys"][0])
    assert not torch.equal(weight, a.weights["values"][0])


def test_pca_keeps_what_varies_most() -> None:
    one, two = geometry(1, 2, 16), geometry(1, 1, 8)
    found = pairs(one, two, tokens=1000, samples=1)
    projector = fit_projector(one, two, [[0]], heads="pca", pairs=found)
    x = rows(found, 0, heldout=False)[:, 0]
    centred = x - x.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    overlap = torch.linalg.svdvals(vh[:8] @ projector.weights["keys"][0].double())
    torch.testing.assert_close(overlap, torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    share = float((s[:8] ** 2).sum() / (s**2).sum())
    assert projector.card["diagnostics"]["keys"][0]["explained_variance"] == pytest.approx(share, abs=1e-5)


def test_procrustes_keeps_the_students_mean_and_variance() -> None:
    one, two = geometry(2, 3, 8), geometry(2, 2, 6)
    found = pairs(one, two, tokens=2000, samples=2)
    projector = fit_projector(one, two, [[0], [1]], heads="procrustes", pairs=found)
    for number, name in enumerate(("keys", "values")):
        made = projector.apply(name, found[0][0][number]).flatten(2)
        own = rows(found, number, heldout=False, student=True).float()
        torch.testing.assert_close(made.mean(0), own.mean(0), atol=1e-3, rtol=0)
        torch.testing.assert_close(made.var(0).sum(-1), own.var(0).sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("heads", FITTED)
def test_unit_scale_is_mean_zero_and_variance_one(heads: str) -> None:
    one, two = geometry(3, 3, 8), geometry(2, 2, 6)
    found = pairs(one, two, tokens=2000, samples=2)
    projector = fit_projector(one, two, [[0], [2]], heads=heads, scale="unit", pairs=found)
    for number, name in enumerate(("keys", "values")):
        made = projector.apply(name, found[0][0][number]).flatten(2)
        torch.testing.assert_close(made.mean(0), torch.zeros(2, 12), atol=1e-3, rtol=0)
        torch.testing.assert_close(made.var(0).mean(-1), torch.ones(2), rtol=1e-3, atol=0)


def test_no_calibration_is_an_error() -> None:
    with pytest.raises(AlignmentError, match="no calibration tokens"):
        fit_projector(geometry(1, 1, 4), geometry(1, 1, 4), [[0]], heads="pca")


def test_wrong_geometry_is_an_error() -> None:
    projector = _fit(geometry(2, 2, 8), geometry(2, 2, 4), "random")
    with pytest.raises(AlignmentError, match=r"made for 2 layers x 2 KV heads x 8, got \(2, 12, 8\)"):
        projector.apply("keys", torch.zeros(3, 2, 12, 8))


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 8])),
    target=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 8])),
    heads=st.sampled_from(FITTED),
    per=st.sampled_from(["layer", "head"]),
    method=st.sampled_from(sorted(RESAMPLERS)),
    cuts=st.tuples(
        st.lists(st.integers(1, 39), min_size=1, max_size=20), st.lists(st.integers(1, 39), min_size=1, max_size=20)
    ),
)
def test_resample_and_project_commute(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    heads: str,
    per: str,
    method: str,
    cuts: tuple[list[int], list[int]],
) -> None:
    one, two = geometry(*source), geometry(*target)
    projector = _fit(one, two, heads, per=per)
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
