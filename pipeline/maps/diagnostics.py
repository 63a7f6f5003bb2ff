"""What a projector keeps of the teacher, and how near it comes to the student: from the moments of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ...store import KVGeometry
from .heads import HEAD_MAPS, FitData, HeadShape
from .layer_fit import cka_matrix
from .moments import NAMES, Calibration, Moments
from .projector import Projector

if TYPE_CHECKING:
    import torch

LOST: Final = 1e-8
"""Variance, as a share of the largest direction's, below which a direction is lost: 1e-4 of its size."""


def measure(projector: Projector, calibration: Calibration) -> dict[str, Any]:
    """Diagnostics of a projector, as its card has them.

    `calibration` says how many samples and tokens it was fitted and measured on, `diagnostics.keys` and
    `diagnostics.values` have for each student layer:

    - `explained_variance`: the share of the teacher's variance (of the joined layers) that can be recovered linearly
      from the targets, on the fitted rows;
    - `r2`: held-out R² of the targets for the student's own tensors; `r2_naive`: that of averaging heads and
      dimensions by overlap, which is the identity where both sides have one shape. With `scale: unit` the student's own
      are brought to unit scale too. None where nothing is held out, absent without a student.

    `cka` `[L_t, L_s]` is there if the calibration has every pair of layers.
    """
    found: dict[str, Any] = {
        "calibration": {"samples": calibration.samples, "tokens": calibration.tokens},
        "diagnostics": {name: [] for name in NAMES},
    }
    naive = naive_projector(projector, calibration)
    for name in NAMES:
        for index, sources in enumerate(projector.layers):
            moments, heldout = calibration.moments(name, sources, index)
            entry: dict[str, float | None] = {
                "explained_variance": explained_variance(projector.weights[name][index].double(), moments.cov_xx)
            }
            if moments.has_student:
                own = heldout
                if own is not None and projector.card["scale"] == "unit":
                    own = own.with_y(moments.mean_y, 1 / (spread(moments) or 1.0))
                for key, candidate in (("r2", projector), ("r2_naive", naive)):
                    weight, bias = (part[name][index].double() for part in (candidate.weights, candidate.biases))
                    entry[key] = None if own is None else own.r2(weight, bias)
            found["diagnostics"][name].append(entry)
    if calibration.fit["keys"].has_every_pair:
        found["cka"] = cka_matrix(calibration, projector.source, projector.target).tolist()
    return found


def naive_projector(projector: Projector, calibration: Calibration) -> Projector:
    """The same layers by the plainest map: heads and dimensions averaged by overlap, in the same scale."""
    import torch

    def plain(name: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sources = projector.layers[index]
        moments, _ = calibration.moments(name, sources, index)
        shape = head_shape(projector.source, projector.target, sources)
        fitted = HEAD_MAPS["mean"].fit(shape, FitData(moments, None, torch.Generator()))
        unit = projector.card["scale"] == "unit"
        weight, bias = standardised(fitted.weight, moments) if unit else (fitted.weight, fitted.bias)
        return weight.float(), bias.float()

    return _with_maps(projector, plain, {"heads": "mean", "scale": projector.card["scale"]})


def head_shape(source: KVGeometry, target: KVGeometry, sources: Sequence[int]) -> HeadShape:
    """From these teacher layers to a student layer."""
    return HeadShape(
        len(sources), source.num_key_value_heads, source.head_dim, target.num_key_value_heads, target.head_dim
    )


def standardised(weight: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The same map, scaled and shifted so that its output has mean zero and, over all its numbers, variance one."""
    import torch

    produced = torch.trace(weight.T @ moments.cov_xx @ weight) / weight.shape[1]
    weight = weight / torch.sqrt(produced) if produced > 0 else weight
    return weight, -moments.mean_x @ weight


def spread(moments: Moments) -> float:
    """Standard deviation of y over all its numbers."""
    return float(moments.cov_yy.diagonal().mean().clamp(min=0).sqrt())


def explained_variance(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """The share of x's variance that a linear map recovers from `z = x W`: `tr(Sxz Szz⁺ Szx) / tr(Sxx)`.

    For principal components it is the share of the kept eigenvalues.
    """
    import torch

    crossed = covariance @ weight
    values, vectors = torch.linalg.eigh(weight.T @ crossed)
    kept = values > LOST * values[-1]
    total = covariance.trace()
    if not kept.any() or total <= 0:
        return 0.0
    recovered = (crossed @ vectors[:, kept]).square().sum(0) / values[kept]
    return float(recovered.sum() / total)


def in_own_scale(projector: Projector, calibration: Calibration) -> Projector:
    """A projector onto `unit` scale brought back to the student's mean and spread, to be used in its place."""
    if projector.card["scale"] != "unit":
        return projector

    def own(name: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        moments, _ = calibration.moments(name, projector.layers[index], index)
        size = spread(moments)
        return projector.weights[name][index] * size, projector.biases[name][index] * size + moments.mean_y.float()

    return _with_maps(projector, own, {**projector.card, "scale": "own"})


def _with_maps(
    projector: Projector, make: Callable[[str, int], tuple[torch.Tensor, torch.Tensor]], card: dict[str, Any]
) -> Projector:
    """The same projector with weight and bias of every student layer from `make(keys or values, layer)`."""
    made = {name: [make(name, index) for index in range(len(projector.layers))] for name in NAMES}
    weights, biases = ({name: [pair[i] for pair in pairs] for name, pairs in made.items()} for i in range(2))
    return replace(projector, weights=weights, biases=biases, card=card)
