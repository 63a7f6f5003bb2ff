"""The KV loss: the student's own pre-RoPE keys and values against cached targets.

Rotation is an isometry, so MSE and cosine on pre-RoPE tensors equal those on the rotated cache, and no positions are
needed. Every layer is divided by the spread of its own target, so that no layer is heard more than another.
Axes: `b` batch, `t` tokens, `h` KV heads, `d` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from ..errors import StageError

if TYPE_CHECKING:
    from .data import Targets


def mse(student: torch.Tensor, target: torch.Tensor, std: float) -> torch.Tensor:
    """Squared error per token `[n]` of `[n, h, d]` tensors, over the target's variance."""
    return F.mse_loss(student, target, reduction="none").mean((-2, -1)) / std**2


def smooth_l1(student: torch.Tensor, target: torch.Tensor, std: float) -> torch.Tensor:
    """Huber loss (beta 1) per token `[n]` in units of the target's standard deviation."""
    return F.smooth_l1_loss(student / std, target / std, reduction="none").mean((-2, -1))


def cosine(student: torch.Tensor, target: torch.Tensor, std: float) -> torch.Tensor:
    """One minus the cosine per token `[n]`, averaged over heads; blind to scale."""
    return (1 - F.cosine_similarity(student, target, dim=-1)).mean(-1)


LOSSES: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]]] = {
    "mse": mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}


@dataclass(frozen=True)
class KVLoss:
    """A weighted mean over layers, keys and values, of a loss over the tokens that have a target."""

    loss: str
    key_weight: float
    value_weight: float
    layers: tuple[int, ...]
    std: Mapping[str, tuple[float, ...]]
    """`keys` and `values`: standard deviation of the target, per layer."""

    @classmethod
    def for_store(
        cls, store: Targets, *, loss: str, key_weight: float, value_weight: float, layers: list[int] | None
    ) -> KVLoss:
        """The loss for the targets of a store, normalised by its own statistics.

        Raises:
            StageError: if a layer is not there, or a target never varies.
        """
        count = store.geometry.num_layers
        chosen = tuple(range(count)) if layers is None else tuple(layers)
        if outside := [layer for layer in chosen if layer >= count]:
            raise StageError(f"train.layers: {outside[0]} is not one of the student's layers 0..{count - 1}")
        statistics = store.statistics()
        std = {name: tuple(statistics[f"{name}_std"].tolist()) for name in ("keys", "values")}
        for name, weight in (("keys", key_weight), ("values", value_weight)):
            if weight and (flat := [layer for layer in chosen if not std[name][layer] > 0]):
                raise StageError(
                    f"{store.path}: the target {name} of layer {flat[0]} never vary; choose another projection"
                )
        return cls(loss, key_weight, value_weight, chosen, std)

    def __call__(
        self,
        student: Mapping[str, Mapping[int, torch.Tensor]],
        target: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss of one batch.

        Args:
            student: `keys` and `values`, per layer `[b, t, h, d]`, with gradient.
            target: `keys` and `values` `[b, t, l, h, d]`.
            mask: `[b, t]` bool: tokens that have a target.

        Returns:
            `kv`, a scalar with gradient, and without gradient each layer's `keys_l` and `values_l`.
        """
        terms: dict[str, torch.Tensor] = {}
        weighted = []
        function = LOSSES[self.loss]
        for name, weight in (("keys", self.key_weight), ("values", self.value_weight)):
            if not weight:
                continue
            for layer in self.layers:
                own = student[name][layer][mask].float()
                error = function(own, target[name][:, :, layer][mask].float(), self.std[name][layer])
                # A batch without any target contributes nothing, and no NaN.
                term = error.mean() if error.numel() else own.sum()
                terms[f"{name}_{layer}"] = term.detach()
                weighted.append(weight * term)
        total = len(self.layers) * (self.key_weight + self.value_weight)
        return {"kv": torch.stack(weighted).sum() / total, **terms}
