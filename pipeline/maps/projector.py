"""The frozen projector: affine maps from teacher geometry to student geometry, applied and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import AlignmentError, DamagedStoreError, StageError, StoreError
from ...store import KVGeometry
from ...store.files import disk_errors, fsync, read_small, write_atomic
from ...store.hashing import hash_bytes
from ...store.safe_json import parse_json, shortened
from ...store.sealed import check_bytes, check_entry, read_sealed, sealed_text
from .layers import LayerMap

if TYPE_CHECKING:
    import torch


PROJECTOR_BYTES: Final = 16 << 30
"""Size limit of a projector: one from 80 layers of 8192 to 22 of 512 has 1.3 GB."""


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
        """Write `path` (safetensors), and beside it the card (`.json`), which holds the size and hash of `path`."""
        data = self.to_bytes()
        card = path.with_suffix(".json")
        if card.exists():  # A card beside another projector's weights would look like damage.
            card.unlink()
            fsync(card.parent)
        write_atomic(path, data)
        # In one order: the card of a projector that was read again comes sorted.
        text = json.dumps({**self._header, **self.card, "file": [len(data), hash_bytes(data)]}, sort_keys=True)
        write_atomic(card, sealed_text(json.loads(text)))

    def to_bytes(self) -> bytes:
        """Return the content of the safetensors file."""
        from safetensors.torch import save

        tensors = {}
        for name in self.weights:
            for index in range(self.target.num_layers):
                tensors[f"{name}.{index}.weight"] = self.weights[name][index].contiguous()
                tensors[f"{name}.{index}.bias"] = self.biases[name][index].contiguous()
        return save(tensors, {"kava_projector": json.dumps({**self._header, "card": self.card}, sort_keys=True)})

    @property
    def _header(self) -> dict[str, Any]:
        return {"source": self.source.model_dump(), "target": self.target.model_dump(), "layers": self.layers}

    @classmethod
    def load(cls, path: Path) -> Projector:
        """Read a saved projector, after comparing it with its card.

        Raises:
            StageError: if it is missing, or is no projector.
            DamagedStoreError: if it or its card is not as it was written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = read_small(path, PROJECTOR_BYTES)
            check_bytes(path, data, read_card(path)["file"])
        except FileNotFoundError as error:
            raise StageError(f"projector {path} is missing: {error}. Fit it again with --force project") from None
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = parse_json(data[8 : 8 + length], path)["__metadata__"]
            header = parse_json(metadata["kava_projector"].encode(), path)
            tensors = load(data)
            source, target = (KVGeometry(**header[side]) for side in ("source", "target"))
            parts = {
                kind: {n: [tensors[f"{n}.{i}.{kind}"] for i in range(target.num_layers)] for n in ("keys", "values")}
                for kind in ("weight", "bias")
            }
            _check_shapes(header, source, target, parts)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise StageError(f"{path} is not a projector: {error}. Fit it again with --force project") from None
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
    card, final_card = path.with_suffix(".json"), final.with_suffix(".json")
    with disk_errors(final):
        final_card.unlink(missing_ok=True)  # Beside other weights it would look like damage.
        fsync(final.parent)
        for source, target in ((path, final), (card, final_card)):
            if source.exists():
                source.replace(target)
        fsync(final.parent)


def remove_projector(path: Path) -> None:
    """Remove a saved projector, with its card."""
    with disk_errors(path):
        for file in (path, path.with_suffix(".json")):
            file.unlink(missing_ok=True)


def read_card(path: Path) -> dict[str, Any]:
    """Read the card of the projector at `path`.

    Raises:
        FileNotFoundError: if there is none.
        DamagedStoreError: if it is not as it was written.
    """
    card = path.with_suffix(".json")
    found = read_sealed(card)
    if "file" not in found:
        raise DamagedStoreError(f"{card}: damaged: it does not say what the projector's file is. Run kava repair")
    return found


def seal_problem(path: Path, card: dict[str, Any]) -> str:
    """What differs between a projector and its card; empty if nothing does."""
    try:
        check_entry(path, card["file"])
    except StoreError as error:
        return str(error)
    return ""
