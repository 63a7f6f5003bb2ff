"""What can be said of a difference: means with intervals, a paired bootstrap, a sign test, steps to a level.

Two questions are kept apart. How much does a result depend on the seed, that is on the order of batches? Student's t
over the seeds answers it. How much on which samples were held out? Resampling those does. Both intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES: Final = 10_000
_BLOCK: Final = 500
"""Resamples at a time: the memory of a block is this many times the samples."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    mean: float
    std: float | None
    """Of single seeds, with one degree of freedom less; None for one seed."""
    interval: tuple[float, float] | None
    """95 % by Student's t; None for one seed."""


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean, spread and `mean ± t(n - 1) std / sqrt(n)`."""
    found = np.asarray(values, dtype=np.float64)
    mean, count = float(found.mean()), len(found)
    if count < 2:
        return Mean(mean, None, None)
    std = float(found.std(ddof=1))
    half = t_quantile(0.975, count - 1) * std / math.sqrt(count)
    return Mean(mean, std, (mean - half, mean + half))


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution for a probability above one half, by bisection of its integral.

    The density is `C (1 + x²/n)^(-(n + 1)/2)`; with `x = sqrt(n) tan(a)` its integral from 0 is that of
    `cos(a)^(n - 1)`, smooth on a finite range, for which Gauss-Legendre is exact to rounding.

    Args:
        probability: in `(0.5, 1)`.
        degrees: of freedom, 1 or more.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)

    def above_half(angle: float) -> float:
        at = angle / 2 * (nodes + 1)
        return float(np.exp(log_c) * angle / 2 * (weights * np.cos(at) ** (degrees - 1)).sum())

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def bootstrap_interval(nats: Array, tokens: Array, *, seed: int = 0) -> tuple[float, float] | None:
    """95 % of `sum(nats) / sum(tokens)` when the held-out samples are drawn anew: percentiles of resamples.

    Given the differences of two arms' nats on the same samples, this is the paired bootstrap of the difference of their
    cross-entropies.

    Args:
        nats: `[n]`: a sum over each sample's predicted tokens.
        tokens: `[n]`: their number.
        seed: of the resampling; with the same one, equal input gives equal intervals.

    Returns:
        None for fewer than two samples.
    """
    if len(nats) < 2:
        return None
    rng, found = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, _BLOCK):
        drawn = rng.integers(len(nats), size=(min(_BLOCK, RESAMPLES - start), len(nats)))
        found.append(nats[drawn].sum(1) / tokens[drawn].sum(1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Signs:
    """On how many samples one of two is lower."""

    lower: int
    higher: int
    p: float
    """Two-sided: how likely a split at least this uneven is if neither is better. Ties do not count."""


def sign_test(differences: Array) -> Signs:
    """The exact sign test: `lower` is binomial with probability one half."""
    lower, higher = int((differences < 0).sum()), int((differences > 0).sum())
    count, fewer = lower + higher, min(lower, higher)
    # In logarithms: 2^-n is no number of float64 from n = 1075 on.
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    tail = sum(math.exp(log - count * math.log(2)) for log in logs)
    return Signs(lower, higher, min(1.0, 2 * tail))


def steps_to(curve: Sequence[tuple[int, float]], level: float) -> int | None:
    """The first step at which a curve was measured at or below a level; None if it never was.

    Between two measurements nothing is assumed: the true number is at most this.

    Args:
        curve: pairs of step and value, in order.
        level: to be reached.
    """
    return next((step for step, value in curve if value <= level), None)
