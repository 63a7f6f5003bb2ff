"""A projector on the student's side, learned with it and dropped at the end.

The frozen maps of the pipeline bring the teacher's tensors into the student's space. This one turns the student's own
towards them instead: what a linear map of each layer can absorb, the student need not learn, as in FitNets (Romero et
al. 2015, arXiv 1412.6550). It can absorb too much: the student's tensors may shrink while it grows, which is why the
spread is measured on the student's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..store import KVGeometry
from .ranks import Ranks


class StudentProjector(nn.Module):
    """`x + x D` for all numbers of a token's keys, or values, in a layer: the identity at first, `D` being zero.

    Weight decay draws it back to the identity.
    """

    def __init__(self, names: Iterable[str], layers: Sequence[int], geometry: KVGeometry) -> None:
        """The identity.

        Args:
            names: what it projects, of `keys` and `values`.
            layers: of which layers.
            geometry: the student's.
        """
        super().__init__()
        self.names, self.layers = tuple(names), tuple(layers)
        width = geometry.width
        self.changes = nn.ParameterDict(
            {f"{name}_{layer}": nn.Parameter(torch.zeros(width, width)) for name in self.names for layer in self.layers}
        )

    def forward(self, student: Mapping[str, Mapping[int, torch.Tensor]]) -> dict[str, dict[int, torch.Tensor]]:
        """What is compared with the targets, in float32: by name and layer `[b, t, h, d]`, as the student's."""
        return {
            name: {layer: self._projected(student[name][layer], f"{name}_{layer}") for layer in self.layers}
            for name in self.names
        }

    def distances(self) -> dict[str, torch.Tensor]:
        """How far each has come from the identity, in its Frobenius norm: `keys_projector_L`, `values_projector_L`."""
        return {
            f"{key.rsplit('_', 1)[0]}_projector_{key.rsplit('_', 1)[1]}": change.detach().norm() / len(change) ** 0.5
            for key, change in self.changes.items()
        }

    def finish_gradient(self, ranks: Ranks, max_norm: float | None) -> None:
        """Makes a step's gradient that of all ranks, no larger than `max_norm`.

        It lies outside of the model, for which torch and the Trainer do both.
        """
        for change in self.changes.values():
            if ranks.size > 1 and change.grad is not None:
                import torch.distributed as dist

                dist.all_reduce(change.grad)
                change.grad /= ranks.size
        if max_norm:
            nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def _projected(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        flat = tensor.float().flatten(2)
        projected: torch.Tensor = flat + flat @ self.changes[key]
        return projected.view(tensor.shape)
