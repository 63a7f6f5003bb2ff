"""The frozen projector: affine maps from teacher geometry to student geometry, applied and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AlignmentError, DamagedStoreError, StageError
from ...store import KVGeometry
from ...store.files import fsync, reading, write_atomic
from ...store.hashing import hash_bytes
from ...store.sealed import check_bytes, check_entry, read_sealed, sealed_text
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
            with reading(path):
                data = path.read_bytes()
            check_bytes(path, data, read_card(path)["file"])
        except FileNotFoundError as error:
            raise StageError(f"projector {path} is missing: {error}. Fit it again with --force project") from None
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["kava_projector"])
            tensors = load(data)
            source, target = (KVGeometry(**header[side]) for side in ("source", "target"))
            parts = {
                kind: {n: [tensors[f"{n}.{i}.{kind}"] for i in range(target.num_layers)] for n in ("keys", "values")}
                for kind in ("weight", "bias")
            }
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise StageError(f"{path} is not a projector: {error}. Fit it again with --force project") from None
        return cls(source, target, header["layers"], parts["weight"], parts["bias"], header["card"])


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
    except DamagedStoreError as error:
        return str(error)
    return ""
