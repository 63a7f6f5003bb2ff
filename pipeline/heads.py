"""Heads and width: affine maps from the teacher's `[k * H_t * D_t]` numbers of a token to the student's `[H_s * D_s]`.

A method is one function that returns `(weight [in, out], bias [out])` in float64 and one line in `HEAD_MAPS`. Keys
and values are fitted separately, each student layer by itself. The maps stay frozen: one trained together with the
student under the KV loss collapses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ..errors import AlignmentError
from .moments import Moments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadShape:
    """What one student layer's map goes from and to."""

    num_layers: int
    """Teacher layers that are joined."""
    source_heads: int
    source_dim: int
    target_heads: int
    target_dim: int

    @property
    def source_width(self) -> int:
        """`in`."""
        return self.num_layers * self.source_heads * self.source_dim

    @property
    def target_width(self) -> int:
        """`out`."""
        return self.target_heads * self.target_dim


Affine = tuple["torch.Tensor", "torch.Tensor"]
Fit = Callable[[HeadShape, Moments, "torch.Generator"], Affine]


def identity(shape: HeadShape, moments: Moments, generator: torch.Generator) -> Affine:
    """The teacher's numbers as they are; only for equal heads and head_dim.

    Raises:
        AlignmentError: if they are not equal.
    """
    import torch

    source = (shape.num_layers, shape.source_heads, shape.source_dim)
    if source != (1, shape.target_heads, shape.target_dim):
        raise AlignmentError(
            f"project.heads: identity needs equal heads and head_dim, not {shape.source_heads} x {shape.source_dim} "
            f"({shape.num_layers} layers) onto {shape.target_heads} x {shape.target_dim}; use procrustes, pca or random"
        )
    return torch.eye(shape.source_width, dtype=torch.float64), torch.zeros(shape.target_width, dtype=torch.float64)


def mean(shape: HeadShape, moments: Moments, generator: torch.Generator) -> Affine:
    """Neighbouring heads, and neighbouring dimensions, averaged by overlap; onto more of them, repeated.

    12 heads onto 2 are two means of 6; 2 onto 12 is each head six times; 3 onto 2 shares the middle one.
    """
    import torch

    layers = torch.full((shape.num_layers, 1), 1 / shape.num_layers, dtype=torch.float64)
    heads = _area(shape.source_heads, shape.target_heads)
    dims = _area(shape.source_dim, shape.target_dim)
    weight = torch.kron(layers, torch.kron(heads, dims))
    return weight, torch.zeros(shape.target_width, dtype=torch.float64)


def random(shape: HeadShape, moments: Moments, generator: torch.Generator) -> Affine:
    """A random orthonormal projection (Johnson-Lindenstrauss): the control that knows nothing of the data."""
    import torch

    return _orthonormal(shape, generator), torch.zeros(shape.target_width, dtype=torch.float64)


def pca(shape: HeadShape, moments: Moments, generator: torch.Generator) -> Affine:
    """The teacher's principal components, centred; onto more dimensions, rotated so that none is empty."""
    basis = _principal(moments.cov_xx, min(shape.source_width, shape.target_width))
    if shape.target_width > basis.shape[1]:
        wide = HeadShape(1, 1, basis.shape[1], shape.target_heads, shape.target_dim)
        basis = basis @ _orthonormal(wide, generator)
    return basis, -moments.mean_x @ basis


def procrustes(shape: HeadShape, moments: Moments, generator: torch.Generator) -> Affine:
    """The teacher's principal components, rotated onto the student's own keys or values at initialisation.

    Orthogonal Procrustes: with `U S Vᵀ = svd(Xᵀ Y)` on centred rows the rotation is `U Vᵀ`. It moves no variance but
    for one scale, which is set so that targets vary as much as the student's own tensors, and their mean is the
    student's.
    """
    import torch

    basis = _principal(moments.cov_xx, min(shape.source_width, shape.target_width))
    u, _, vh = torch.linalg.svd(basis.T @ moments.cov_xy, full_matrices=False)
    weight = basis @ u @ vh
    produced = torch.trace(weight.T @ moments.cov_xx @ weight)
    if produced > 0:
        weight = weight * torch.sqrt(torch.trace(moments.cov_yy) / produced)
    return weight, moments.mean_y - moments.mean_x @ weight


@dataclass(frozen=True)
class HeadMap:
    """A method and what it must see."""

    fit: Fit
    needs: Literal["nothing", "teacher", "student"]
    """`teacher`: second moments of the teacher's tensors; `student`: paired with the student's own."""


HEAD_MAPS: Final[dict[str, HeadMap]] = {
    "identity": HeadMap(identity, "nothing"),
    "mean": HeadMap(mean, "nothing"),
    "random": HeadMap(random, "nothing"),
    "pca": HeadMap(pca, "teacher"),
    "procrustes": HeadMap(procrustes, "student"),
}


def _area(source: int, target: int) -> torch.Tensor:
    """`[source, target]`: overlap of equal cells on one line, columns summing to one."""
    import torch

    # Edges in units of 1 / (source * target), so that they are whole numbers.
    low = torch.arange(source).mul(target).unsqueeze(1)
    start = torch.arange(target).mul(source).unsqueeze(0)
    overlap = torch.minimum(low + target, start + source) - torch.maximum(low, start)
    shares = overlap.clamp(min=0).double()
    normalised: torch.Tensor = shares / shares.sum(0, keepdim=True)
    return normalised


def _orthonormal(shape: HeadShape, generator: torch.Generator) -> torch.Tensor:
    """`[in, out]` with orthonormal columns, or rows where there are fewer of them."""
    import torch

    tall = max(shape.source_width, shape.target_width), min(shape.source_width, shape.target_width)
    basis, upper = torch.linalg.qr(torch.randn(tall, dtype=torch.float64, generator=generator))
    q: torch.Tensor = basis * torch.sign(torch.diagonal(upper))  # Without this the distribution is not uniform.
    return q if shape.source_width >= shape.target_width else q.T.contiguous()


def _principal(covariance: torch.Tensor, count: int) -> torch.Tensor:
    """`[in, count]`: eigenvectors of the largest eigenvalues, each with its largest entry positive."""
    import torch

    _, vectors = torch.linalg.eigh(covariance)
    basis: torch.Tensor = vectors.flip(1)[:, :count]
    largest = basis.abs().argmax(0)
    return basis * torch.sign(basis[largest, torch.arange(count)])
