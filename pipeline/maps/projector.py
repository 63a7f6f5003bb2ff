"""The frozen projector: affine maps from teacher geometry to student geometry, applied and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AlignmentError, StageError
from ...store import KVGeometry
from ...store.files import check_regular, disk_errors, write_atomic
from ...store.safe_json import parse_json, shortened
from .layers import LayerMap

if TYPE_CHECKING:
    import torch


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
            # One layer is a view, which the product reads as it lies; several are copied side by side.
            joined = flat[:, sources[0]] if len(sources) == 1 else flat[:, sources].flatten(1)
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
        # In one order: the card of a projector that was read again comes sorted.
        write_atomic(path.with_suffix(".json"), json.dumps({**header, **self.card}, indent=2, sort_keys=True).encode())

    @classmethod
    def load(cls, path: Path) -> Projector:
        """Reads a saved projector.

        Raises:
            StageError: if it is not there or not one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            check_regular(path)
            with safe_open(path, "pt") as file:
                header = parse_json((file.metadata() or {})["kava_projector"].encode(), path)
                source, target = (KVGeometry(**header[side]) for side in ("source", "target"))
                layers = range(target.num_layers)
                parts = {
                    kind: {n: [file.get_tensor(f"{n}.{i}.{kind}") for i in layers] for n in ("keys", "values")}
                    for kind in ("weight", "bias")
                }
            _check_shapes(header, source, target, parts)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise StageError(f"projector {path} cannot be read: {error}; rerun with --force project") from None
        return cls(source, target, header["layers"], parts["weight"], parts["bias"], header["card"])


def _check_shapes(header: dict[str, Any], source: KVGeometry, target: KVGeometry, parts: dict[str, Any]) -> None:
    """Check that the tensors of a projector are those that its header describes.

    Raises:
        ValueError: if they are not.
    """
    layers = header["layers"]
    if len(layers) != target.num_layers:
        raise ValueError(f"it maps {len(layers)} layers to {target.num_layers}")
    for index, sources in enumerate(layers):
        if not sources or any(type(n) is not int or not 0 <= n < source.num_layers for n in sources):
            raise ValueError(f"layer {index} reads the layers {shortened(sources)} of {source.num_layers}")
        shapes = {"weight": (len(sources) * source.width, target.width), "bias": (target.width,)}
        for kind, shape in shapes.items():
            for name, tensors in parts[kind].items():
                if tuple(tensors[index].shape) != shape:
                    raise ValueError(f"{name}.{index}.{kind} has shape {tuple(tensors[index].shape)}, expected {shape}")
    if not isinstance(header["card"], dict):
        raise ValueError("its card is no object")


def move_projector(path: Path, final: Path) -> None:
    """Give a saved projector another name on the same file system, with its card."""
    with disk_errors(final):
        for source, target in ((path, final), (path.with_suffix(".json"), final.with_suffix(".json"))):
            if source.exists():
                source.replace(target)


def remove_projector(path: Path) -> None:
    """Remove a saved projector, with its card."""
    with disk_errors(path):
        for file in (path, path.with_suffix(".json")):
            file.unlink(missing_ok=True)
