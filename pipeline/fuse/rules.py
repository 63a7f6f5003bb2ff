"""Several teachers' targets as one: weights for each sample, and a weighted sum on a common scale.

Teachers differ in scale from layer to layer, and they disagree: a plain average is pulled by the loudest, and varies
less than any of them. So each is standardised, and the sum is divided by the spread that it has, which follows from the
weights and the teachers' correlations. Axes: `n` samples, `k` teachers, `t` tokens, `l` layers, `h` KV heads, `d`
head_dim; one mean, spread and correlation for each layer, over all its heads and dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import AlignmentError, StageError
from ..maps.moments import NAMES

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

MIN_VARIANCE: Final = 1e-3
"""Of a weighted sum of standardised targets: below it the teachers cancel, and what is left is noise."""


def fixed(share: Array, told: Array) -> Array:
    """`[n, k]`: the recipe's numbers, for every sample."""
    return np.broadcast_to(share, told.shape)


def confidence(share: Array, told: Array) -> Array:
    """`[n, k]`: `1 - softmax_k(CE_k)`, which CA-MKD (arXiv 2201.00007) divides by `K - 1`.

    Args:
        share: `[k]`, not used.
        told: `[n, k]` float64: nats per byte over the temperature; infinite below zero for who is not there.
    """
    shifted = np.exp(told - told.max(-1, keepdims=True))
    return np.asarray(1 - shifted / shifted.sum(-1, keepdims=True))


def entropy(share: Array, told: Array) -> Array:
    """`[n, k]`: `1 - H_k / sum_j H_j`, EBKD's weights of who is sure.

    Args:
        share: `[k]`, not used.
        told: `[n, k]` float64: entropy in nats per byte; zero for who is not there.
    """
    total = told.sum(-1, keepdims=True)
    return np.asarray(1 - np.divide(told, total, out=np.zeros_like(told), where=total > 0))


@dataclass(frozen=True)
class Rule:
    """A way to weigh teachers."""

    weigh: Callable[[Array, Array], Array]
    """Of `share` `[k]` and what captures told `[n, k]`: weights `[n, k]` that need not sum to one."""
    measure: str | None = None
    """What of a capture is told: `nats` or `entropy`, in nats per byte; None for nothing."""
    absent: float = 0.0
    """What stands there for a teacher that has no target of the sample."""


RULES: Final[Mapping[str, Rule]] = {
    "fixed": Rule(fixed),
    "confidence": Rule(confidence, "nats", float("-inf")),
    "entropy": Rule(entropy, "entropy"),
}


@dataclass(frozen=True)
class Weighting:
    """How much each teacher counts in each sample."""

    rule: str = "fixed"
    """A name in `RULES`."""
    fixed: tuple[float, ...] = ()
    """`[k]`, for `fixed`; empty for alike."""
    temperature: float = 1.0
    """Divides the loss, for `confidence`: below 1 the surest teacher gets more."""

    def __call__(self, there: Array, told: Array) -> Array:
        """Weights that sum to one over the teachers that are there.

        Where a rule gives all of them nothing (there is only one) or has nothing to go by (a teacher predicted no byte
        of the text), they count alike.

        Args:
            there: `[n, k]` bool: the sample did not fail in this teacher.
            told: `[n, k]` float64: what `RULES` says the rule goes by; not read by `fixed`.

        Returns:
            `[n, k]` float64; a row of zeros where nobody is there.
        """
        rule = RULES[self.rule]
        share = np.asarray(self.fixed or [1.0] * there.shape[1])
        known = np.ones(len(there), np.bool_)
        if rule.measure is not None:
            known = np.isfinite(np.where(there, told, 0)).all(1) & there.any(1)
            scale = self.temperature if self.rule == "confidence" else 1.0
            told = np.where(known[:, None], np.where(there, told / scale, rule.absent), 0)
        return normalised(np.where(known[:, None], rule.weigh(share, told), 0), there)


def normalised(weights: Array, there: Array) -> Array:
    """Weights `[..., k]` that sum to one over those that are `there`; alike where these have none, zero elsewhere."""
    kept = np.where(there, weights, 0.0)
    kept = np.where(kept.sum(-1, keepdims=True) > 0, kept, there)
    total = kept.sum(-1, keepdims=True)
    return np.asarray(np.divide(kept, total, out=np.zeros_like(kept, np.float64), where=total > 0))


@dataclass
class Correlations:
    """Pearson correlations of the teachers' standardised targets, per layer, from sums in float64.

    Of two teachers over the tokens where both have a target. Memory is that of a sample.
    """

    num_teachers: int
    num_layers: int
    _sums: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = (6, self.num_layers, self.num_teachers, self.num_teachers)
        self._sums = {name: np.zeros(size) for name in NAMES}

    def add(self, name: str, tensors: Sequence[torch.Tensor], masks: Array) -> None:
        """Adds a sample.

        Args:
            name: `keys` or `values`.
            tensors: for each teacher `[t, l, h, d]`, standardised: sums of numbers near one lose no digits.
            masks: `[k, t]` bool: tokens that have a target.
        """
        import torch

        for i in range(self.num_teachers):
            for j in range(i):
                both = torch.from_numpy(masks[i] & masks[j])
                x, y = (tensors[n][both].double().flatten(2) for n in (i, j))
                count = x.new_full((self.num_layers,), x.shape[0] * x.shape[2])
                sums = [count, x.sum((0, 2)), y.sum((0, 2))]
                sums += [torch.einsum("tlw,tlw->l", a, b) for a, b in ((x, x), (y, y), (x, y))]
                self._sums[name][:, :, i, j] += torch.stack(sums).numpy()

    def matrices(self) -> dict[str, Array]:
        """`keys` and `values`, each `[l, k, k]`, ones on the diagonal; NaN for two teachers that never met."""
        out = {}
        for name, sums in self._sums.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                count, x, y, xx, yy, xy = sums
                found = (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))
            found = np.tril(found, -1)
            out[name] = found + found.swapaxes(-1, -2) + np.eye(self.num_teachers)
        return out


@dataclass(frozen=True)
class Blend:
    """The weighted sum of several teachers' targets on a common scale.

    With `z_k = (x_k - mean_k) / std_k` and weights `w` that sum to one over the teachers with a target of the token,

        fused = mean + std * (sum_k w_k z_k) / sqrt(w' C w),    mean = sum_k a_k mean_k,    std = sum_k a_k std_k,

    where `C` is the correlation of the teachers' targets and `a` the average weights over the training samples: one
    scale for the whole store. Where the correlations hold, the variance of the fused targets is `std**2` whatever the
    weights. One teacher, or several that say the same, come out as they are.
    """

    teachers: tuple[str, ...]
    mean: Mapping[str, Array]
    """`keys` and `values`, each `[k, l]`: of each teacher's targets."""
    std: Mapping[str, Array]
    """`[k, l]`: zero for a teacher that has none."""
    correlation: Mapping[str, Array]
    """`[l, k, k]`."""
    share: Array
    """`[k]`: average weights; zero for a teacher that has no target."""

    def common(self, name: str) -> tuple[Array, Array]:
        """Mean and standard deviation `[l]` of the fused `keys` or `values`."""
        return self.share @ self.mean[name], self.share @ self.std[name]

    def coefficients(self, name: str, weights: Array) -> tuple[Array, Array]:
        """`a` `[k, l]` and `b` `[l]` of `fused = sum_k a_k x_k + b`, for weights `[k]` that sum to one.

        Raises:
            AlignmentError: if the teachers cancel in a layer.
            StageError: if the correlation of two of them is not known.
        """
        at = np.flatnonzero(weights)
        w, own = weights[at], self.std[name][at]
        variance = np.einsum("i,lij,j->l", w, self.correlation[name][:, at[:, None], at], w)
        if not (variance > MIN_VARIANCE).all():
            layer = int(np.flatnonzero(~(variance > MIN_VARIANCE))[0])
            who = " and ".join(self.teachers[k] for k in at)
            if np.isnan(variance[layer]):
                raise StageError(
                    f"fuse: no calibration token has targets of both {who}, so how they go together is not known; "
                    "raise project.calibration_samples"
                )
            raise AlignmentError(f"fuse: the {name} of {who} cancel in layer {layer}; leave a teacher out")
        mean, std = self.common(name)
        scale = np.zeros(self.std[name].shape)
        scale[at] = w[:, None] * std / (own * np.sqrt(variance))
        return scale, mean - (scale * self.mean[name]).sum(0)

    def __call__(self, name: str, tensors: Sequence[torch.Tensor | None], weights: Array, masks: Array) -> torch.Tensor:
        """The fused `keys` or `values` of one sample, in float32; zero where no teacher has a target.

        Args:
            name: `keys` or `values`.
            tensors: for each teacher `[t, l, h, d]`, finite; None for one that has no target of the sample.
            weights: `[k]`.
            masks: `[k, t]` bool: tokens that have a target.
        """
        import torch

        patterns, which = np.unique(masks, axis=1, return_inverse=True)
        layers = self.std[name].shape[1]
        scale, shift = np.zeros((len(patterns.T), len(weights), layers)), np.zeros((len(patterns.T), layers))
        for number, pattern in enumerate(patterns.T):
            if pattern.any():
                scale[number], shift[number] = self.coefficients(name, normalised(weights, pattern))
        rows = torch.from_numpy(which.reshape(-1))
        shape = next(tensor.shape for tensor in tensors if tensor is not None)
        out = torch.from_numpy(shift).float()[rows][:, :, None, None].expand(shape).contiguous()
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                out.addcmul_(torch.from_numpy(scale[:, number]).float()[rows][:, :, None, None], tensor.float())
        return out
