"""Each fitted head map against an oracle of its own in float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fixtures.pairs import Pair, geometry, pairs, rows

from kava.errors import AlignmentError
from kava.pipeline.maps.heads import HEAD_MAPS, RIDGE
from kava.pipeline.maps.project import fit_projector

Array = np.ndarray[Any, Any]
NAMES = ("keys", "values")


def _sides(found: list[tuple[Pair, Pair | None]], kind: int, sources: list[int], target: int) -> list[Array]:
    """x and y of the fitted rows, then of the held-out rows."""
    return [
        rows(found, kind, heldout=held, student=student)[:, [target] if student else sources].flatten(1).numpy()
        for held in (False, True)
        for student in (False, True)
    ]


def _ridge(x: Array, y: Array, penalty: float) -> tuple[Array, Array]:
    """Least squares on rows with the penalty as further rows, by numpy's lstsq."""
    centred, width = x - x.mean(0), x.shape[1]
    strength = np.sqrt(penalty * (centred**2).sum() / width)
    more = np.concatenate([centred, strength * np.eye(width)])
    weight = np.linalg.lstsq(more, np.concatenate([y - y.mean(0), np.zeros((width, y.shape[1]))]), rcond=None)[0]
    return weight, y.mean(0) - x.mean(0) @ weight


def _r2(x: Array, y: Array, weight: Array, bias: Array) -> float:
    return float(1 - ((x @ weight + bias - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def test_ridge_is_penalised_least_squares_with_the_best_held_out_penalty() -> None:
    one, two, layers = geometry(3, 2, 4), geometry(2, 3, 2), [[0], [2, 1]]
    found = pairs(one, two, tokens=20, samples=6)
    projector = fit_projector(one, two, layers, heads="ridge", pairs=found)
    chosen = set()
    for kind, name in enumerate(NAMES):
        for target, sources in enumerate(layers):
            x, y, x_h, y_h = _sides(found, kind, sources, target)
            scores = {penalty: _r2(x_h, y_h, *_ridge(x, y, penalty)) for penalty in RIDGE}
            best = max(scores, key=lambda penalty: scores[penalty])
            weight, bias = _ridge(x, y, best)
            np.testing.assert_allclose(projector.weights[name][target], weight, atol=1e-5)
            np.testing.assert_allclose(projector.biases[name][target], bias, atol=1e-5)
            assert projector.card["penalties"][name][target] == (best,)
            entry = projector.card["diagnostics"][name][target]
            assert entry["r2"] == pytest.approx(scores[best], abs=1e-5)
            chosen.add(best)
    assert len(chosen) > 1, "a case in which there is something to choose"


def test_cca_puts_canonical_directions_onto_each_other() -> None:
    """Canonical directions by QR of the rows (Björck and Golub 1973): a map onto `b` must be `a`."""
    one, two = geometry(2, 3, 4), geometry(2, 2, 4)
    found = pairs(one, two, tokens=200, samples=4)
    projector = fit_projector(one, two, [[0], [1]], heads="cca", pairs=found)
    for kind, name in enumerate(NAMES):
        for target in range(2):
            x, y, _, _ = _sides(found, kind, [target], target)
            n = len(x)
            (q_x, r_x), (q_y, r_y) = (np.linalg.qr(z - z.mean(0)) for z in (x, y))
            u, correlations, vh = np.linalg.svd(q_x.T @ q_y, full_matrices=False)
            assert 0.1 < correlations.min() < correlations.max() < 0.99
            a, b = np.linalg.solve(r_x, u) * np.sqrt(n), np.linalg.solve(r_y, vh.T) * np.sqrt(n)
            weight = projector.weights[name][target].double().numpy()
            np.testing.assert_allclose(weight @ b, a, atol=1e-3)
            made = x @ weight + projector.biases[name][target].double().numpy()
            np.testing.assert_allclose(made.mean(0), y.mean(0), atol=1e-5)
            np.testing.assert_allclose(np.cov(made.T), np.cov(y.T), atol=1e-4)
            pairwise = [np.corrcoef(made @ b[:, i], y @ b[:, i])[0, 1] for i in range(8)]
            np.testing.assert_allclose(pairwise, correlations, atol=1e-5)


def test_cca_of_a_narrower_or_empty_teacher_stays_finite() -> None:
    one, two = geometry(1, 1, 4), geometry(1, 3, 4)
    found = pairs(one, two)
    for (keys, _), _ in found:
        keys[..., 1] = keys[..., 0]  # A direction without variance.
        keys[..., 2] = 7
    projector = fit_projector(one, two, [[0]], heads="cca", pairs=found)
    assert torch.linalg.matrix_rank(projector.weights["keys"][0], rtol=1e-4) == 2
    made = projector.apply("keys", found[0][0][0]).flatten(1)
    assert made.isfinite().all()
    assert made.std() < 3 * rows(found, 0, heldout=False, student=True).std()


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize(("heads", "more"), [("procrustes", {}), ("ridge", {"ridge": [1e-12]}), ("cca", {})])
def test_a_rotated_teacher_is_found_exactly(heads: str, per: Any, more: dict[str, Any]) -> None:
    """The student is the teacher, each head rotated in itself, with a scale and a shift."""
    generator = torch.Generator().manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(2, 6, 6, generator=generator))[0]
    one = geometry(1, 2, 6)
    found = []
    for _ in range(2):
        x = torch.randn(300, 1, 2, 6, generator=generator) * torch.linspace(0.5, 2, 6)
        y = 0.25 * torch.einsum("tlhd,hde->tlhe", x, rotations) + 4
        found.append(((x, x), (y, -y)))
    projector = fit_projector(one, one, [[0]], heads=heads, per=per, pairs=found, **more)
    for kind, name in enumerate(NAMES):
        made = projector.apply(name, found[1][0][kind])
        torch.testing.assert_close(made, found[1][1][kind], atol=1e-4, rtol=1e-4)
        assert projector.card["diagnostics"][name][0]["r2"] == pytest.approx(1, abs=1e-6)
        assert projector.card["diagnostics"][name][0]["explained_variance"] == pytest.approx(1, abs=1e-6)
        assert projector.card["diagnostics"][name][0]["r2_naive"] < 0.5
    block = 0.25 * torch.cat([torch.cat([r * (i == j) for j in range(2)], dim=1) for i, r in enumerate(rotations)])
    torch.testing.assert_close(projector.weights["keys"][0], block, atol=1e-4, rtol=0)


def test_ridge_shrinks_and_cca_and_procrustes_do_not() -> None:
    """The trap of regression: where the student is hardly predictable, its targets hardly vary."""
    one, two = geometry(1, 2, 8), geometry(1, 2, 8)
    found = pairs(one, two, tokens=2000)
    for teacher, own in found:
        assert own is not None
        own[0].copy_(0.3 * teacher[0] + 2 * torch.randn(own[0].shape, generator=torch.Generator().manual_seed(5)))
    own_variance = rows(found, 0, heldout=True, student=True).var(0).sum()
    share = {}
    for heads in ("ridge", "cca", "procrustes"):
        made = fit_projector(one, two, [[0]], heads=heads, pairs=found).apply("keys", found[1][0][0])
        share[heads] = float(made.flatten(1).var(0).sum() / own_variance)
    assert share["ridge"] < 0.25
    assert share["cca"] == pytest.approx(1, abs=0.1)
    assert share["procrustes"] == pytest.approx(1, abs=0.1)


OVERLAPS = {
    (4, 2): [[0, 1], [2, 3]],
    (3, 2): [[0, 1], [1, 2]],
    (2, 4): [[0], [0], [1], [1]],
    (2, 3): [[0], [0, 1], [1]],
    (3, 1): [[0, 1, 2]],
    (2, 2): [[0], [1]],
}


@pytest.mark.parametrize("shape", OVERLAPS)
@pytest.mark.parametrize("heads", [name for name in HEAD_MAPS if name != "identity"])
def test_per_head_each_head_is_a_fit_of_its_own(heads: str, shape: tuple[int, int]) -> None:
    """A target head's block is what the method gives for the overlapping source heads alone; all else is zero."""
    one, two = geometry(2, shape[0], 4), geometry(1, shape[1], 3)
    found = pairs(one, two)
    whole = fit_projector(one, two, [[0, 1]], heads=heads, per="head", pairs=found)
    weight = whole.weights["keys"][0].view(2, shape[0], 4, shape[1], 3)
    for head, sources in enumerate(OVERLAPS[shape]):
        others = [h for h in range(shape[0]) if h not in sources]
        assert not weight[:, others, :, head].any()
        assert (weight[:, sources, :, head].abs().sum((0, 2)) > 0).all()
        if heads == "random":  # Drawn one after the other: only that each is orthonormal can be told.
            block = weight[:, sources, :, head].flatten(0, 2)
            torch.testing.assert_close(block.T @ block, torch.eye(3), atol=1e-6, rtol=0)
        elif heads != "mean":
            cut = [
                ((t[0][:, :, sources], t[1][:, :, sources]), (own[0][:, :, [head]], own[1][:, :, [head]]))
                for t, own in found
                if own is not None
            ]
            alone = fit_projector(geometry(2, len(sources), 4), geometry(1, 1, 3), [[0, 1]], heads=heads, pairs=cut)
            part = weight[:, sources, :, head].flatten(0, 2)
            torch.testing.assert_close(part, alone.weights["keys"][0], atol=1e-6, rtol=1e-5)
            bias = whole.biases["keys"][0].view(shape[1], 3)[head]
            torch.testing.assert_close(bias, alone.biases["keys"][0], atol=1e-6, rtol=1e-5)


def test_maps_by_head_are_the_same_either_way() -> None:
    one, two = geometry(2, 3, 8), geometry(2, 2, 8)
    either = [fit_projector(one, two, [[0], [1]], heads="mean", per=per) for per in ("layer", "head")]
    assert torch.equal(either[0].weights["keys"][0], either[1].weights["keys"][0])
    same = fit_projector(one, one, [[0], [1]], heads="identity", per="head")
    assert torch.equal(same.weights["keys"][0], torch.eye(24))
    with pytest.raises(AlignmentError, match="identity needs equal heads"):
        fit_projector(geometry(2, 2, 8), geometry(2, 4, 8), [[0], [1]], heads="identity", per="head")


@pytest.mark.parametrize("heads", ["ridge", "cca", "procrustes", "pca"])
def test_units_and_axes_of_the_teacher_do_not_matter(heads: str) -> None:
    """A rotated, scaled and shifted teacher gives the same targets; principal components keep the scale."""
    one, two = geometry(1, 2, 4), geometry(1, 1, 6)
    found = pairs(one, two)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    scale = 1.0 if heads == "pca" else 5.0

    def turned(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = scale * x.flatten(1) @ rotation + 3
        return made.view(x.shape)

    other = [((turned(k), turned(v)), own) for (k, v), own in found]
    a, b = (fit_projector(one, two, [[0]], heads=heads, pairs=p) for p in (found, other))
    made, again = (p.apply("keys", side[0][0][0]) for p, side in ((a, found), (b, other)))
    if heads == "pca":  # Up to signs.
        made, again = made.abs(), again.abs()
    torch.testing.assert_close(made, again, atol=2e-3, rtol=1e-3)
