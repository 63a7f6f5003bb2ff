"""Sums from which every linear fit follows: counts, means and second moments in float64, streamed over samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Moments:
    """First and second moments of paired rows `x [n, p]` and `y [n, q]`; memory does not grow with `n`."""

    count: int
    x: torch.Tensor
    """`[p]`: sum of x."""
    y: torch.Tensor
    """`[q]`: sum of y."""
    xx: torch.Tensor
    """`[p, p]`: sum of x xᵀ."""
    xy: torch.Tensor
    """`[p, q]`."""
    yy: torch.Tensor
    """`[q, q]`."""

    @classmethod
    def zeros(cls, p: int, q: int) -> Moments:
        """No rows yet."""
        import torch

        def zero(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(0, zero(p), zero(q), zero(p, p), zero(p, q), zero(q, q))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows."""
        x, y = x.double(), y.double()
        self.count += x.shape[0]
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.T @ y

    @property
    def mean_x(self) -> torch.Tensor:
        """`[p]`."""
        return self.x / max(self.count, 1)

    @property
    def mean_y(self) -> torch.Tensor:
        """`[q]`."""
        return self.y / max(self.count, 1)

    @property
    def cov_xx(self) -> torch.Tensor:
        """`[p, p]`: covariance of x."""
        return self.xx / max(self.count, 1) - self.mean_x.outer(self.mean_x)

    @property
    def cov_xy(self) -> torch.Tensor:
        """`[p, q]`: covariance of x with y."""
        return self.xy / max(self.count, 1) - self.mean_x.outer(self.mean_y)

    @property
    def cov_yy(self) -> torch.Tensor:
        """`[q, q]`: covariance of y."""
        return self.yy / max(self.count, 1) - self.mean_y.outer(self.mean_y)
