"""Depth, heads and width: the frozen projector from teacher geometry to student geometry.

Fitting reads paired samples once and keeps second moments; applying is one matrix product per student layer. Projection
acts on one token at a time and resampling on one number at a time, so the two commute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AlignmentError, StageError
from ..store import KVGeometry
from ..store.files import write_atomic
from .heads import HEAD_MAPS, Affine, HeadShape
from .layers import LayerMap
from .moments import Moments

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]
"""Keys and values, each `[t, l, h, d]`."""


@dataclass(frozen=True)
class Projector:
    """Affine maps for keys and values of every student layer."""

    source: KVGeometry
    target: KVGeometry
    layers: LayerMap
    weights: dict[str, list[torch.Tensor]]
    """`keys` and `values`: per student layer `[in, out]` float32."""
    biases: dict[str, list[torch.Tensor]]
    """`keys` and `values`: per student layer `[out]` float32."""
    card: dict[str, Any]
    """How it was made, and what the fit says of itself."""

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Projects `keys` or `values`.

        Args:
            name: `keys` or `values`.
            tensor: `[t, l, h, d]` in the source geometry.

        Returns:
            `[t, l, h, d]` float32 in the target geometry.

        Raises:
            AlignmentError: if the tensor has another geometry.
        """
        import torch

        if tuple(tensor.shape[1:]) != self.source.shape:
            raise AlignmentError(f"projector: made for {self.source}, got {tuple(tensor.shape[1:])}")
        flat = tensor.float().flatten(2)
        out = torch.empty((tensor.shape[0], self.target.num_layers, self.target.width), dtype=torch.float32)
        for index, sources in enumerate(self.layers):
            joined = flat[:, sources].flatten(1)
            torch.addmm(self.biases[name][index], joined, self.weights[name][index], out=out[:, index])
        return out.view(-1, *self.target.shape)

    def save(self, path: Path) -> None:
        """Writes `path` (safetensors) and beside it the card (`.json`)."""
        from safetensors.torch import save

        tensors = {}
        for name in self.weights:
            for index in range(self.target.num_layers):
                tensors[f"{name}.{index}.weight"] = self.weights[name][index].contiguous()
                tensors[f"{name}.{index}.bias"] = self.biases[name][index].contiguous()
        header = {"source": self.source.model_dump(), "target": self.target.model_dump(), "layers": self.layers}
        write_atomic(path, save(tensors, {"kava_projector": json.dumps({**header, "card": self.card}, sort_keys=True)}))
        write_atomic(path.with_suffix(".json"), json.dumps({**header, **self.card}, indent=2).encode())

    @classmethod
    def load(cls, path: Path) -> Projector:
        """Reads a saved projector.

        Raises:
            StageError: if it is not there or not one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["kava_projector"])
                source, target = (KVGeometry(**header[side]) for side in ("source", "target"))
                layers = range(target.num_layers)
                parts = {
                    kind: {n: [file.get_tensor(f"{n}.{i}.{kind}") for i in layers] for n in ("keys", "values")}
                    for kind in ("weight", "bias")
                }
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StageError(f"projector {path} cannot be read: {error}; rerun with --force project") from None
        return cls(source, target, header["layers"], parts["weight"], parts["bias"], header["card"])


def fit_projector(
    source: KVGeometry,
    target: KVGeometry,
    layers: LayerMap,
    *,
    heads: str,
    scale: str = "own",
    pairs: Iterable[tuple[Pair, Pair | None]] = (),
    seed: int = 0,
) -> Projector:
    """Fits one affine map per student layer, for keys and for values.

    Args:
        source: the teacher's geometry.
        target: the student's geometry.
        layers: teacher layers for each student layer.
        heads: a name in `HEAD_MAPS`.
        scale: `own`, or `unit` for targets that have mean zero and variance one in every layer.
        pairs: the teacher's keys and values on the student's tokens and, where the method needs them, the student's
        own;
            read once. Only rows that have a target.
        seed: of the `random` and widening maps.

    Raises:
        AlignmentError: if geometries do not fit, or no rows were given to a method that needs some.
    """
    import torch

    method = HEAD_MAPS[heads]
    measured = method.needs != "nothing" or scale == "unit"
    shapes = [
        HeadShape(len(s), source.num_key_value_heads, source.head_dim, target.num_key_value_heads, target.head_dim)
        for s in layers
    ]
    moments = {
        name: [Moments.zeros(s.source_width, s.target_width if method.needs == "student" else 0) for s in shapes]
        for name in ("keys", "values")
    }
    if measured:
        for teacher, student in pairs:
            _accumulate(moments, layers, teacher, student if method.needs == "student" else None)
        if moments["keys"][0].count < 2:
            raise AlignmentError(f"project: {heads} with scale {scale} has no calibration tokens to be fitted on")
    weights: dict[str, list[torch.Tensor]] = {}
    biases: dict[str, list[torch.Tensor]] = {}
    diagnostics: dict[str, list[dict[str, float]]] = {}
    for name in ("keys", "values"):
        generator = torch.Generator().manual_seed(seed * 2 + (name == "values"))
        fitted = [method.fit(s, m, generator) for s, m in zip(shapes, moments[name], strict=True)]
        if scale == "unit":
            fitted = [standardised(weight, m) for (weight, _), m in zip(fitted, moments[name], strict=True)]
        weights[name] = [weight.float() for weight, _ in fitted]
        biases[name] = [bias.float() for _, bias in fitted]
        if measured:
            diagnostics[name] = [_diagnose(m, w, b) for m, (w, b) in zip(moments[name], fitted, strict=True)]
    card = {
        "heads": heads,
        "scale": scale,
        "seed": seed,
        "calibration_tokens": moments["keys"][0].count,
        "diagnostics": diagnostics,
    }
    return Projector(source, target, layers, weights, biases, card)


def standardised(weight: torch.Tensor, moments: Moments) -> Affine:
    """The same map, scaled and shifted so that its output has mean zero and, over all its numbers, variance one."""
    import torch

    produced = torch.trace(weight.T @ moments.cov_xx @ weight) / weight.shape[1]
    weight = weight / torch.sqrt(produced) if produced > 0 else weight
    return weight, -moments.mean_x @ weight


def _accumulate(moments: dict[str, list[Moments]], layers: LayerMap, teacher: Pair, student: Pair | None) -> None:
    for number, name in enumerate(("keys", "values")):
        x = teacher[number].double().flatten(2)
        y = None if student is None else student[number].double().flatten(2)
        for index, sources in enumerate(layers):
            rows = x[:, sources].flatten(1)
            moments[name][index].add(rows, rows[:, :0] if y is None else y[:, index])


def _diagnose(moments: Moments, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, float]:
    """Share of the teacher's variance that the map's directions carry, and R² against the student's own tensors."""
    import torch

    q, _ = torch.linalg.qr(weight)
    total = torch.trace(moments.cov_xx)
    found = {"explained_variance": float(torch.trace(q.T @ moments.cov_xx @ q) / total) if total > 0 else 0.0}
    if moments.y.numel():
        own = torch.trace(moments.cov_yy)
        error = own - 2 * (weight * moments.cov_xy).sum() + torch.trace(weight.T @ moments.cov_xx @ weight)
        shift = moments.mean_y - moments.mean_x @ weight - bias
        found["r2"] = float(1 - (error + shift @ shift) / own) if own > 0 else 0.0
    return found
