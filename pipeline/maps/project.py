"""Depth, heads and width: the frozen projector from teacher geometry to student geometry.

Fitting reads paired samples once and keeps second moments; applying is one matrix product per student layer. Projection
acts on one token at a time and resampling on one number at a time, so the two commute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...errors import AlignmentError
from ...store import KVGeometry
from .diagnostics import head_shape, measure, standardised
from .heads import HEAD_MAPS, RIDGE, FitData, fit_heads
from .layer_fit import choose_layers, wanted_for
from .layers import LayerMap
from .moments import NAMES, Calibration, Moments, Pair
from .projector import Projector

if TYPE_CHECKING:
    import torch


def fit_projector(
    source: KVGeometry,
    target: KVGeometry,
    layers: LayerMap | str,
    *,
    heads: str,
    per: Literal["layer", "head"] = "layer",
    scale: str = "own",
    ridge: Sequence[float] = RIDGE,
    top_k: int = 4,
    pairs: Iterable[tuple[Pair, Pair | None] | None] = (),
    seed: int = 0,
) -> Projector:
    """Fits one affine map per student layer, for keys and for values.

    Every fifth pair is held out (`is_held_out`): maps are fitted on the others and measured on these, which also choose
    the layers of `best` and the penalty of `ridge`. With a single pair nothing is held out: maps that choose are
    refused, and the card has no R².

    Args:
        source: the teacher's geometry.
        target: the student's geometry.
        layers: teacher layers for each student layer, or `cka` or `best` to choose them.
        heads: a name in `HEAD_MAPS`.
        per: `layer` maps all heads together, `head` each target head from the source heads that it overlaps.
        scale: `own`, or `unit` for targets that have mean zero and variance one in every layer.
        ridge: penalties that `ridge` and `best` choose from.
        top_k: teacher layers that `best` joins, at most.
        pairs: the teacher's keys and values on the student's tokens and, where the method needs them, the student's
            own, for each sample; read once. Only rows that have a target.
        seed: of the `random` and widening maps.

    Raises:
        AlignmentError: if geometries do not fit, or no rows were given to a method that needs some.
    """
    import torch

    method = HEAD_MAPS[heads]
    paired = method.needs == "student" or isinstance(layers, str)
    measured = paired or method.needs == "teacher" or scale == "unit"
    calibration = None
    if measured:
        wanted = wanted_for(layers, source, target)
        calibration = Calibration.gather(source, target if paired else None, wanted, pairs)
        if calibration.tokens["fit"] < 2:
            raise AlignmentError(
                f"project: heads {heads} with scale {scale}, layers {layers if isinstance(layers, str) else 'given'}, "
                "has no calibration tokens to be fitted on"
            )
    card: dict[str, Any] = {"heads": heads, "per": per, "scale": scale, "seed": seed}
    if isinstance(layers, str):
        assert calibration is not None
        layers, card["layers_by"] = choose_layers(layers, calibration, source, target, top_k=top_k, ridge=ridge)
    weights: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    biases: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    penalties: dict[str, list[tuple[float, ...]]] = {name: [] for name in NAMES}
    for name in NAMES:
        generator = torch.Generator().manual_seed(seed * 2 + (name == "values"))
        for index, sources in enumerate(layers):
            shape = head_shape(source, target, sources)
            moments, heldout = Moments.empty(shape.source_width, shape.target_width), None
            if calibration is not None:
                moments, heldout = calibration.moments(name, sources, index)
            fitted = fit_heads(method, shape, FitData(moments, heldout, generator, ridge), per=per)
            weight, bias = fitted.weight, fitted.bias
            if scale == "unit":
                weight, bias = standardised(weight, moments)
            weights[name].append(weight.float())
            biases[name].append(bias.float())
            penalties[name].append(fitted.penalties)
    if any(penalties["keys"]):
        card["penalties"] = penalties
    projector = Projector(source, target, layers, weights, biases, card)
    if calibration is not None:
        card |= measure(projector, calibration)
    return projector
