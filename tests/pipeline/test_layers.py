"""Layer maps: those known beforehand by hand, those chosen at the fit against an exhaustive search."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from fixtures.pairs import Pair, geometry, pairs, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.pipeline.maps.heads import RIDGE
from kava.pipeline.maps.layer_fit import choose_layers, cka_matrix, monotone, wanted_for
from kava.pipeline.maps.layers import FITTED, PLANNED, LayerMap, explicit, last_aligned, layer_map, uniform
from kava.pipeline.maps.moments import Calibration
from kava.pipeline.maps.project import fit_projector


@given(st.integers(1, 90), st.integers(1, 90))
def test_uniform_layers(source: int, target: int) -> None:
    found = [layer for (layer,) in uniform(source, target)]
    assert found[-1] == source - 1
    assert target == 1 or found[0] == 0
    assert found == sorted(found)
    assert all(abs(layer - i * (source - 1) / max(target - 1, 1)) <= 0.5 for i, layer in enumerate(found) if target > 1)
    if source == target:
        assert found == list(range(source))


@given(st.integers(1, 90), st.integers(1, 90))
def test_last_aligned_layers(source: int, target: int) -> None:
    found = [layer for (layer,) in last_aligned(source, target)]
    assert len(found) == target
    for back in range(target):
        assert found[-1 - back] == max(source - 1 - back, 0)


def test_explicit_layers() -> None:
    assert explicit([0, [1, 2], -1], 5, 3) == [[0], [1, 2], [4]]
    assert layer_map("uniform", 28, 22) == uniform(28, 22)
    assert layer_map("last-aligned", 28, 22) == [[i] for i in range(6, 28)]
    assert layer_map("last-aligned", 2, 4) == [[0], [0], [0], [1]]
    with pytest.raises(AlignmentError, match="lists 2 layers, the student has 3"):
        explicit([0, 1], 5, 3)
    with pytest.raises(AlignmentError, match=r"layer 5 is not one of 0\.\.4"):
        explicit([0, 5], 5, 2)
    joined = fit_projector(geometry(3, 2, 4), geometry(1, 2, 4), [[0, 2]], heads="mean")
    x = torch.randn(4, 3, 2, 4)
    torch.testing.assert_close(joined.apply("keys", x)[:, 0], (x[:, 0] + x[:, 2]) / 2)


def test_the_recipe_knows_every_layer_map() -> None:
    from typing import get_args

    from kava.pipeline.recipe import ProjectSettings

    names = get_args(get_args(ProjectSettings.model_fields["layers"].annotation)[0])
    assert set(names) == {*PLANNED, *FITTED}
    assert layer_map("cka", 3, 3) is layer_map("best", 3, 3) is None


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10000), st.booleans())
def test_monotone_is_the_best_of_all_monotone_maps(source: int, target: int, seed: int, ties: bool) -> None:
    similarity = np.random.default_rng(seed).uniform(size=(source, target))
    similarity = similarity.round(1) if ties else similarity
    found = monotone(torch.from_numpy(similarity))
    assert found == sorted(found)
    scores = {
        path: sum(similarity[i, j] for j, i in enumerate(path))
        for path in combinations_with_replacement(range(source), target)
    }
    assert sum(similarity[i, j] for j, i in enumerate(found)) == pytest.approx(max(scores.values()))
    if not ties:
        assert tuple(found) == max(scores, key=lambda path: scores[path])


def _linked(links: LayerMap, source_layers: int, *, samples: int = 4) -> list[tuple[Pair, Pair | None]]:
    """Student layers that are rotations of the sum of some teacher layers, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    turns = torch.linalg.qr(torch.randn(2, len(links), 12, 12, generator=generator))[0]
    out: list[tuple[Pair, Pair | None]] = []
    for _ in range(samples):
        sides: list[tuple[torch.Tensor, torch.Tensor]] = []
        for kind in range(2):
            x = torch.randn(200, source_layers, 12, generator=generator)
            y = torch.stack([x[:, s].sum(1) @ turns[kind, j] for j, s in enumerate(links)], dim=1)
            y = y + 0.1 * torch.randn(y.shape, generator=generator)
            sides.append((x.view(200, -1, 3, 4), 2 * y.view(200, -1, 2, 6) + 1))
        out.append(((sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])))
    return out


@pytest.mark.parametrize(
    ("links", "depth"),
    [([[0], [2], [2], [5]], 6), ([[0], [0], [1], [1], [1], [2]], 3), ([[3]], 4)],
    ids=["shallower", "deeper", "one"],
)
def test_cka_finds_the_layers_that_a_student_is_made_of(links: LayerMap, depth: int) -> None:
    one, two = geometry(depth, 3, 4), geometry(len(links), 2, 6)
    projector = fit_projector(one, two, "cka", heads="procrustes", pairs=_linked(links, depth))
    assert projector.layers == links
    cka = np.array(projector.card["cka"])
    assert cka.shape == (depth, len(links))
    assert all(cka[i, j] > 0.9 for j, (i,) in enumerate(links))
    assert projector.card["layers_by"] == {"method": "cka"}
    assert all(entry["r2"] > 0.9 for entry in projector.card["diagnostics"]["keys"])


def test_best_joins_the_layers_that_a_student_is_made_of_and_no_others() -> None:
    links = [[1], [0, 3], [0, 2, 4], [2, 3]]
    one, two = geometry(5, 3, 4), geometry(4, 2, 6)
    found = fit_projector(one, two, "best", heads="ridge", top_k=3, pairs=_linked(links, 5))
    assert found.layers == links
    assert all(entry["r2"] > 0.98 for entry in found.card["diagnostics"]["values"])
    fewer = fit_projector(one, two, "best", heads="ridge", top_k=1, pairs=_linked(links, 5))
    assert all(len(sources) == 1 for sources in fewer.layers)


def test_best_scores_are_ridges_by_hand() -> None:
    one, two = geometry(3, 2, 3), geometry(2, 1, 4)
    found = pairs(one, two, tokens=60, samples=5)
    calibration = Calibration.gather(one, two, wanted_for("best", one, two), found)
    layers, by = choose_layers("best", calibration, one, two, top_k=2, ridge=[0.1])
    score = {}
    for j in range(2):
        for sources in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
            total = 0.0
            for kind in range(2):
                x, y, x_h, y_h = (
                    rows(found, kind, heldout=h, student=s)[:, [j] if s else sources].flatten(1).numpy()
                    for h in (False, True)
                    for s in (False, True)
                )
                centred, p = x - x.mean(0), x.shape[1]
                penalty = 0.1 * (centred**2).sum() / p
                weight = np.linalg.solve(centred.T @ centred + penalty * np.eye(p), centred.T @ (y - y.mean(0)))
                error = ((x_h - x.mean(0)) @ weight + y.mean(0) - y_h) ** 2
                total += 1 - error.sum() / ((y_h - y_h.mean(0)) ** 2).sum()
            score[j, tuple(sources)] = total / 2
        np.testing.assert_allclose(np.array(by["r2"])[:, j], [score[j, (i,)] for i in range(3)], rtol=1e-8)
        order = sorted(range(3), key=lambda i: -score[j, (i,)])
        pair = tuple(sorted(order[:2]))
        assert tuple(layers[j]) == (pair if score[j, pair] > score[j, (order[0],)] else (order[0],))


def test_cka_matrix_is_the_mean_of_keys_and_values() -> None:
    one, two = geometry(3, 2, 3), geometry(2, 1, 4)
    found = pairs(one, two, tokens=60, samples=5)
    calibration = Calibration.gather(one, two, wanted_for("cka", one, two), found)
    matrix = cka_matrix(calibration, one, two)
    for i in range(3):
        for j in range(2):
            total = 0.0
            for kind in range(2):
                x, y = (rows(found, kind, heldout=False, student=s)[:, j if s else i].numpy() for s in (False, True))
                x, y = x - x.mean(0), y - y.mean(0)
                total += ((y.T @ x) ** 2).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            assert float(matrix[i, j]) == pytest.approx(total / 2, rel=1e-9)


def test_what_is_chosen_on_held_out_samples_needs_some() -> None:
    one, two = geometry(3, 2, 3), geometry(2, 1, 4)
    alone = pairs(one, two, samples=1)
    with pytest.raises(AlignmentError, match="best chooses on held-out samples"):
        fit_projector(one, two, "best", heads="pca", pairs=alone)
    with pytest.raises(AlignmentError, match=f"one of {len(RIDGE)} penalties needs held-out samples"):
        fit_projector(one, two, [[0], [1]], heads="ridge", pairs=alone)
    card = fit_projector(one, two, "cka", heads="ridge", ridge=[0.1], pairs=alone).card
    assert card["calibration"]["samples"] == {"fit": 1, "heldout": 0}
    assert card["diagnostics"]["keys"][0]["r2"] is None
