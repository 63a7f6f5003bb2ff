"""The KV loss: the student's own pre-RoPE keys and values against cached targets.

Rotation is an isometry, so MSE and cosine on pre-RoPE tensors equal those on the rotated cache, and no positions are
needed. Every layer is divided by the spread of its own target, so that no layer is heard more than another. Each loss
gives one error per token that has a target, whether it looks at that token alone or at its sample's other tokens too;
weights of segments and layers are then the same for all.
Axes: `b` batch, `t` tokens, `n` tokens with a target, `h` KV heads, `d` head_dim, `a` relation heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from ..errors import StageError
from ..store import SEGMENTS, KVGeometry

if TYPE_CHECKING:
    from .data import Targets

ZERO_NORM: Final = 1e-4
"""Vectors shorter than this, in standard deviations of the target per number, count as short as this."""


@dataclass(frozen=True)
class LossOptions:
    """Parameters of single losses."""

    magnitude_weight: float = 1.0
    """`cosine_magnitude`: weight of the squared difference of log norms."""
    relation_heads: int | None = None
    """`relation`: heads that all numbers of a token are cut into; None for the number of the target's KV heads."""


def mse(student: torch.Tensor, target: torch.Tensor, std: float, options: LossOptions) -> torch.Tensor:
    """Squared error per token `[n]` of `[n, h, d]` tensors, over the target's variance."""
    # `F.mse_loss` would keep both tensors for the backward pass; this keeps their difference, at half the memory.
    return (student - target).square().mean((-2, -1)) / std**2


def smooth_l1(student: torch.Tensor, target: torch.Tensor, std: float, options: LossOptions) -> torch.Tensor:
    """Huber loss (beta 1) per token `[n]` in units of the target's standard deviation."""
    return F.smooth_l1_loss(student / std, target / std, reduction="none").mean((-2, -1))


def cosine(student: torch.Tensor, target: torch.Tensor, std: float, options: LossOptions) -> torch.Tensor:
    """One minus the cosine per token `[n]`, averaged over heads; blind to scale."""
    return (1 - F.cosine_similarity(student, target, dim=-1)).mean(-1)


def cosine_magnitude(student: torch.Tensor, target: torch.Tensor, std: float, options: LossOptions) -> torch.Tensor:
    """`1 - cos + w (log|s| - log|t|)²` per token `[n]`, averaged over heads: direction and length, each on its own.

    Squared norms have `(ZERO_NORM std)² d` added, so that neither value nor gradient is infinite at zero.
    """
    floor = (ZERO_NORM * std) ** 2 * student.shape[-1]
    own, wanted = (tensor.square().sum(-1) + floor for tensor in (student, target))
    angle = 1 - (student * target).sum(-1) * (own * wanted).rsqrt()
    return (angle + options.magnitude_weight * ((own.log() - wanted.log()) / 2).square()).mean(-1)


def relation(
    student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, std: float, options: LossOptions
) -> torch.Tensor:
    """How tokens relate to the sample's earlier ones, per token `[n]`; MiniLMv2, arXiv 2012.15828.

    All numbers of a token, in units of the target's standard deviation, are cut into `a` heads of `d_r` numbers; the
    error is `KL(softmax(T Tᵀ / √d_r) || softmax(S Sᵀ / √d_r))` in nats over this and earlier tokens of the sample that
    have a target, averaged over heads. Neither KV heads nor head_dim need be the target's, only `a` must divide both
    widths. A rotation inside each head, the same for all tokens, changes nothing.

    Args:
        student: `[b, t, h, d]`.
        target: `[b, t, h', d']`.
        mask: `[b, t]` bool.
        std: of the target.
        options: has `relation_heads`.
    """
    heads = options.relation_heads or target.shape[-2]
    tokens = mask.shape[1]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
    # A token sees itself even without a target: a row of nothing would be NaN, here it is merely not read.
    seen = (earlier & mask[:, None, :] | itself)[:, None]
    wanted, own = (
        F.log_softmax(_scores(tensor, mask, heads, std).masked_fill(~seen, -torch.inf), dim=-1)
        for tensor in (target, student)
    )
    divergence = wanted.exp() * (wanted - own).masked_fill(~seen, 0)
    error: torch.Tensor = divergence.sum(-1).mean(1)[mask]
    return error


def _scores(tensor: torch.Tensor, mask: torch.Tensor, heads: int, std: float) -> torch.Tensor:
    """`X Xᵀ / √d_r` of every relation head, `[b, a, t, t]`; tokens without a target are zero."""
    kept = tensor.masked_fill(~mask[..., None, None], 0) / std
    split = kept.reshape(*mask.shape, heads, -1).transpose(1, 2)
    scores: torch.Tensor = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, LossOptions], torch.Tensor]
"""`(student [b, t, h, d], target [b, t, h, d], mask [b, t], std, options)` to the errors `[n]` of the tokens in `mask`,
row by row; float32 in and out."""


@dataclass(frozen=True)
class EachToken:
    """A loss that looks at one token at a time."""

    rows: Callable[[torch.Tensor, torch.Tensor, float, LossOptions], torch.Tensor]
    """Of `[n, h, d]` tensors."""

    def __call__(
        self, student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, std: float, options: LossOptions
    ) -> torch.Tensor:
        """See `Loss`."""
        return self.rows(student[mask], target[mask], std, options)


LOSSES: Final[Mapping[str, Loss]] = {
    "mse": EachToken(mse),
    "smooth_l1": EachToken(smooth_l1),
    "cosine": EachToken(cosine),
    "cosine_magnitude": EachToken(cosine_magnitude),
    "relation": relation,
}

ACROSS_TOKENS: Final = frozenset({"relation"})
"""Losses that compare the tokens of a row with each other."""


def _sample_by_sample(loss: Loss, samples: torch.Tensor) -> Loss:
    """The loss of rows with several samples, each of which it sees in a row of its own.

    Args:
        loss: sees a row as one sample.
        samples: `[b, t]`, the number of each token's sample in the batch, in order, -1 for padding.
    """
    lengths = torch.bincount(samples[samples >= 0])
    inside = torch.arange(int(lengths.max()), device=samples.device) < lengths[:, None]
    places = torch.zeros_like(inside, dtype=torch.int64)
    # Samples lie one after the other, row by row: in that order their tokens fill the new rows.
    places[inside] = torch.nonzero((samples >= 0).flatten()).squeeze(1)

    def alone(
        student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, std: float, options: LossOptions
    ) -> torch.Tensor:
        own, wanted = (tensor.flatten(0, 1)[places] for tensor in (student, target))
        return loss(own, wanted, mask.flatten()[places] & inside, std, options)

    return alone


@dataclass(frozen=True)
class KVLoss:
    """A weighted mean over layers, keys and values, of a loss over the tokens that have a target."""

    loss: str
    key_weight: float
    value_weight: float
    layers: tuple[int, ...]
    std: Mapping[str, tuple[float, ...]]
    """`keys` and `values`: standard deviation of the target, per layer."""
    layer_weights: tuple[float, ...] | None = None
    """One per entry of `layers`; None, or all the same, weighs nothing."""
    segment_weights: Mapping[str, float] = field(default_factory=dict)
    """By name of a segment, 1 where it is left out."""
    options: LossOptions = LossOptions()

    @classmethod
    def for_store(
        cls,
        store: Targets,
        *,
        loss: str,
        key_weight: float,
        value_weight: float,
        layers: list[int] | None,
        layer_weights: Sequence[float] | Mapping[int, float] | None = None,
        segment_weights: Mapping[str, float] | None = None,
        options: LossOptions | None = None,
    ) -> KVLoss:
        """The loss for the targets of a store, normalised by its own statistics.

        Args:
            store: the targets.
            loss: a name in `LOSSES`.
            key_weight: of all keys against all values.
            value_weight: of all values against all keys.
            layers: the student's layers; None for all.
            layer_weights: one per layer, in the order of `layers`, or by layer, 1 where it is left out.
            segment_weights: by segment, 1 where it is left out.
            options: of the loss.

        Raises:
            StageError: if a layer is not there, a target never varies, or weights or relation heads do not fit.
        """
        options = options or LossOptions()
        chosen, weights = check_shape(
            store.geometry, loss=loss, layers=layers, layer_weights=layer_weights, options=options
        )
        statistics = store.statistics()
        std = {name: tuple(statistics[f"{name}_std"].tolist()) for name in ("keys", "values")}
        for name, weight in (("keys", key_weight), ("values", value_weight)):
            if weight and (flat := [layer for layer in chosen if not std[name][layer] > 0]):
                raise StageError(
                    f"{store.path}: the target {name} of layer {flat[0]} never vary; choose another projection"
                )
        return cls(loss, key_weight, value_weight, chosen, std, weights, dict(segment_weights or {}), options)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of `keys` and `values` that have a weight."""
        weights = {"keys": self.key_weight, "values": self.value_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def token_weights(self, mask: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor | None:
        """The weight of each token in `mask` `[n]`, float32; None where all segments weigh the same.

        Args:
            mask: `[b, t]` bool: tokens that have a target.
            segments: `[b, t]` uint8; not needed where all segments weigh the same.
        """
        table = [self.segment_weights.get(name, 1.0) for name in SEGMENTS]
        if len(set(table)) == 1:
            return None
        assert segments is not None
        return torch.tensor(table, device=mask.device)[segments[mask].long()]

    def total_weight(self, mask: torch.Tensor, segments: torch.Tensor | None) -> float:
        """What the loss of a batch is a mean over: the sum of `token_weights`, or how many tokens have a target."""
        weights = self.token_weights(mask, segments)
        return float((mask if weights is None else weights).sum())

    def __call__(
        self,
        student: Mapping[str, Mapping[int, torch.Tensor]],
        target: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
        segments: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of one batch.

        Args:
            student: `keys` and `values`, per layer `[b, t, h, d]`, with gradient.
            target: `keys` and `values`, those that have a weight: `[b, t, l, h, d]`, `l` being those of `layers`.
            mask: `[b, t]` bool: tokens that have a target.
            segments: `[b, t]` uint8, the number of each token's segment; not needed without segment weights.
            samples: `[b, t]`, the number of each token's sample in the batch, -1 for padding; None for one a row.

        Returns:
            `kv`, a scalar with gradient, and without gradient each layer's `keys_l` and `values_l`, in which segments
            are weighted and layers are not.
        """
        terms: dict[str, torch.Tensor] = {}
        weighted = []
        function = LOSSES[self.loss]
        if samples is not None and self.loss in ACROSS_TOKENS:
            function = _sample_by_sample(function, samples)
        # Which tokens these are is found out once, for all layers: on a device it is waited for each time.
        rows = torch.nonzero(mask.flatten()).squeeze(1) if isinstance(function, EachToken) else None
        weights = self.token_weights(mask, segments)
        layer_weights = self.layer_weights or (1.0,) * len(self.layers)
        for name, weight in (("keys", self.key_weight), ("values", self.value_weight)):
            if not weight:
                continue
            if target[name].shape[2] != len(self.layers):
                raise ValueError(f"{target[name].shape[2]} layers of target {name} for a loss on layers {self.layers}")
            for place, (layer, layer_weight) in enumerate(zip(self.layers, layer_weights, strict=True)):
                own, std = student[name][layer], self.std[name][layer]
                if rows is not None and isinstance(function, EachToken):
                    own = own.flatten(0, 1).index_select(0, rows)
                    wanted = target[name].flatten(0, 1)[:, place].index_select(0, rows)
                    error = function.rows(own.float(), wanted.float(), std, self.options)
                else:
                    error = function(own.float(), target[name][:, :, place].float(), mask, std, self.options)
                # A batch without any target, or with none that counts, contributes nothing, and no NaN.
                if weights is not None:
                    term = (weights * error).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
                else:
                    term = error.mean() if error.numel() else error.sum()
                terms[f"{name}_{layer}"] = term.detach()
                weighted.append(weight * layer_weight * term)
        total = sum(layer_weights) * (self.key_weight + self.value_weight)
        return {"kv": torch.stack(weighted).sum() / total, **terms}


def check_shape(
    geometry: KVGeometry,
    *,
    loss: str,
    layers: Sequence[int] | None,
    layer_weights: Sequence[float] | Mapping[int, float] | None,
    options: LossOptions,
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Check what a KV loss is asked for against the student's geometry.

    Returns:
        The layers with a KV loss, and one weight for each; None if all weights are the same.

    Raises:
        StageError: if a layer does not exist, or weights or relation heads do not fit.
    """
    count = geometry.num_layers
    chosen = tuple(range(count)) if layers is None else tuple(layers)
    if outside := [layer for layer in chosen if layer >= count]:
        raise StageError(f"train.layers: {outside[0]} is not one of the student's layers 0..{count - 1}")
    width = geometry.num_key_value_heads * geometry.head_dim
    if loss == "relation" and options.relation_heads and width % options.relation_heads:
        raise StageError(
            f"train.relation_heads: {options.relation_heads} does not divide the {width} numbers of a key "
            f"({geometry.num_key_value_heads} KV heads x {geometry.head_dim})"
        )
    return chosen, _layer_weights(layer_weights, chosen)


def _layer_weights(
    stated: Sequence[float] | Mapping[int, float] | None, layers: tuple[int, ...]
) -> tuple[float, ...] | None:
    """One weight for each of `layers`; None if they are all the same."""
    if stated is None:
        return None
    if isinstance(stated, Mapping):
        if unknown := sorted(set(stated) - set(layers)):
            raise StageError(f"train.layer_weights: layer {unknown[0]} has no KV loss; those that have: {layers}")
        weights = tuple(float(stated.get(layer, 1.0)) for layer in layers)
    else:
        weights = tuple(map(float, stated))
        if len(weights) != len(layers):
            raise StageError(
                f"train.layer_weights: {len(weights)} weights for {len(layers)} layers with a KV loss; give one for "
                "each, or a mapping from layer to weight"
            )
    if not any(weights):
        raise StageError("train.layer_weights: all are 0; set alpha: 0 to train without targets")
    return None if len(set(weights)) == 1 else weights
