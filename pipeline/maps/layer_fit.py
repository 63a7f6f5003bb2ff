"""Layer maps that are chosen on calibration samples, from streamed moments alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import AlignmentError
from ...store import KVGeometry
from .heads import best_ridge
from .layers import LayerMap
from .moments import NAMES, Calibration, Wanted

if TYPE_CHECKING:
    import torch


def wanted_for(layers: LayerMap | str, source: KVGeometry, target: KVGeometry) -> Wanted:
    """The moments that must be gathered for a map, given or still to be chosen."""
    if not isinstance(layers, str):
        return Wanted.for_map(layers)
    return Wanted.for_cka(source, target) if layers == "cka" else Wanted.for_search(source, target)


def choose_layers(
    method: str, calibration: Calibration, source: KVGeometry, target: KVGeometry, *, top_k: int, ridge: Sequence[float]
) -> tuple[LayerMap, dict[str, Any]]:
    """The teacher layers of each student layer.

    Args:
        method: `cka` or `best`.
        calibration: with the blocks of `wanted_for(method, ...)`.
        source: the teacher's geometry.
        target: the student's geometry.
        top_k: of `best`: joins this many layers at most.
        ridge: of `best`: the penalties to choose from.

    Returns:
        The map, and what it was chosen by: a matrix `[L_t, L_s]`.

    Raises:
        AlignmentError: if `best` has nothing held out to choose by.
    """
    if method == "cka":
        similarity = cka_matrix(calibration, source, target)
        return [[layer] for layer in monotone(similarity)], {"method": "cka"}
    if not calibration.tokens["heldout"]:
        raise AlignmentError(
            "project.layers: best chooses on held-out samples and there are none; give it 2 calibration samples or more"
        )
    scores = r2_matrix(calibration, source, target, ridge)
    layers = [_best_of(calibration, scores[:, j], j, top_k, ridge) for j in range(target.num_layers)]
    return layers, {"method": "best", "top_k": top_k, "r2": scores.tolist()}


def cka_matrix(calibration: Calibration, source: KVGeometry, target: KVGeometry) -> torch.Tensor:
    """`[L_t, L_s]`: linear CKA of each teacher with each student layer on the fitted rows, mean of keys and values."""
    import torch

    return torch.tensor(
        [
            [
                sum(calibration.fit[name].moments([i], j).cka for name in NAMES) / len(NAMES)
                for j in range(target.num_layers)
            ]
            for i in range(source.num_layers)
        ],
        dtype=torch.float64,
    )


def monotone(similarity: torch.Tensor) -> list[int]:
    """One teacher layer for each student layer, never falling, that together are as similar as can be.

    Dynamic programme over `[L_t, L_s]`: the best sum that ends at teacher layer `i` is `similarity[i, j]` plus the best
    of the student layer before at any layer up to `i`. Of equal sums the lower layers are taken.
    """
    rows, columns = similarity.shape
    totals = similarity[:, 0].tolist()
    before: list[list[int]] = []
    for j in range(1, columns):
        best, come_from = 0, []
        for i in range(rows):
            best = i if totals[i] > totals[best] else best
            come_from.append(best)
        before.append(come_from)
        totals = [totals[come_from[i]] + float(similarity[i, j]) for i in range(rows)]
    path = [max(range(rows), key=lambda i: (totals[i], -i))]
    for come_from in reversed(before):
        path.append(come_from[path[-1]])
    return path[::-1]


def r2_matrix(calibration: Calibration, source: KVGeometry, target: KVGeometry, ridge: Sequence[float]) -> torch.Tensor:
    """`[L_t, L_s]`: held-out R² of a ridge from one teacher layer to one student layer, mean of keys' and values'."""
    import torch

    out = torch.zeros(source.num_layers, target.num_layers, dtype=torch.float64)
    for i in range(source.num_layers):
        spectra = {name: torch.linalg.eigh(calibration.fit[name].moments([i], 0).cov_xx) for name in NAMES}
        for j in range(target.num_layers):
            out[i, j] = _ridge_r2(calibration, [i], j, ridge, spectra)
    return out


def _best_of(
    calibration: Calibration, scores: torch.Tensor, target: int, top_k: int, ridge: Sequence[float]
) -> list[int]:
    """Of the layers that predict best alone, as many as predict best together, `top_k` at most; fewer of equal ones."""
    order = scores.argsort(descending=True, stable=True).tolist()
    choices = [sorted(order[:count]) for count in range(1, min(top_k, len(order)) + 1)]
    return max(choices, key=lambda sources: (_ridge_r2(calibration, sources, target, ridge), -len(sources)))


def _ridge_r2(
    calibration: Calibration,
    sources: Sequence[int],
    target: int,
    ridge: Sequence[float],
    spectra: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> float:
    total = 0.0
    for name in NAMES:
        moments, heldout = calibration.moments(name, sources, target)
        _, r2 = best_ridge(moments, heldout, ridge, spectrum=None if spectra is None else spectra[name])
        total += r2 or 0.0  # None is a layer that does not vary: every choice is as good.
    return total / len(NAMES)
