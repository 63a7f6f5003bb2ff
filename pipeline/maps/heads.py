"""Heads and width: affine maps from the teacher's `[k * H_t * D_t]` numbers of a token to the student's `[H_s * D_s]`.

A method is one function of a shape and of what it is fitted on, in float64, and one line in `HEAD_MAPS`. Keys and
values are fitted separately, each student layer by itself. The maps stay frozen: one trained together with the student
under the KV loss collapses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ...errors import AlignmentError
from .moments import Moments

if TYPE_CHECKING:
    import torch

RIDGE: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that `ridge` chooses from, relative to the mean variance of the teacher's numbers."""
CCA_EPSILON: Final = 1e-6
"""Directions with less variance than this share of the mean are left out of whitening, which would blow them up."""


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


@dataclass(frozen=True)
class Affine:
    """`x weight + bias`, in float64."""

    weight: torch.Tensor
    """`[in, out]`."""
    bias: torch.Tensor
    """`[out]`."""
    penalties: tuple[float, ...] = ()
    """What `ridge` chose: one number, or one of each target head."""


@dataclass(frozen=True)
class FitData:
    """What a map may look at."""

    moments: Moments
    """Of the rows that are not held out."""
    heldout: Moments | None
    """Of those that are, for choices; None if there are none."""
    generator: torch.Generator
    ridge: Sequence[float] = RIDGE


Fit = Callable[[HeadShape, FitData], Affine]


def identity(shape: HeadShape, data: FitData) -> Affine:
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
    return Affine(torch.eye(shape.source_width, dtype=torch.float64), _zeros(shape.target_width))


def mean(shape: HeadShape, data: FitData) -> Affine:
    """Neighbouring heads, and neighbouring dimensions, averaged by overlap; onto more of them, repeated.

    12 heads onto 2 are two means of 6; 2 onto 12 is each head six times; 3 onto 2 shares the middle one.
    """
    import torch

    layers = torch.full((shape.num_layers, 1), 1 / shape.num_layers, dtype=torch.float64)
    heads = _area(shape.source_heads, shape.target_heads)
    dims = _area(shape.source_dim, shape.target_dim)
    return Affine(torch.kron(layers, torch.kron(heads, dims)), _zeros(shape.target_width))


def random(shape: HeadShape, data: FitData) -> Affine:
    """A random orthonormal projection (Johnson-Lindenstrauss): the control that knows nothing of the data."""
    return Affine(_orthonormal(shape, data.generator), _zeros(shape.target_width))


def pca(shape: HeadShape, data: FitData) -> Affine:
    """The teacher's principal components, centred; onto more dimensions, rotated so that none is empty."""
    moments = data.moments
    basis = _principal(moments.cov_xx, min(shape.source_width, shape.target_width))
    if shape.target_width > basis.shape[1]:
        wide = HeadShape(1, 1, basis.shape[1], shape.target_heads, shape.target_dim)
        basis = basis @ _orthonormal(wide, data.generator)
    return Affine(basis, -moments.mean_x @ basis)


def procrustes(shape: HeadShape, data: FitData) -> Affine:
    """The teacher's principal components, rotated onto the student's own keys or values at initialisation.

    Orthogonal Procrustes: with `U S Vᵀ = svd(Xᵀ Y)` on centred rows the rotation is `U Vᵀ`. It moves no variance but
    for one scale, which is set so that targets vary as much as the student's own tensors, and their mean is the
    student's.
    """
    import torch

    moments = data.moments
    basis = _principal(moments.cov_xx, min(shape.source_width, shape.target_width))
    u, _, vh = torch.linalg.svd(basis.T @ moments.cov_xy, full_matrices=False)
    weight = basis @ u @ vh
    produced = torch.trace(weight.T @ moments.cov_xx @ weight)
    if produced > 0:
        weight = weight * torch.sqrt(torch.trace(moments.cov_yy) / produced)
    return Affine(weight, moments.mean_y - moments.mean_x @ weight)


def ridge(shape: HeadShape, data: FitData) -> Affine:
    """The least-squares prediction of the student's own keys or values from the teacher's, with a penalty.

    `W = (Sxx + lambda tr(Sxx) / in I)⁻¹ Sxy`, `b = mean y - mean x W` (Heo et al. 2026,
    https://arxiv.org/abs/2608.03893); lambda is the one of `ridge` with the best held-out R².

    It gives the mean of the student's tensors given the teacher's. What the teacher has and the untrained student has
    not is thrown away, and targets vary less than the student's own tensors: a student trained on them learns little
    but what it knew. `procrustes` and `cca` keep variance; take this one to measure how much can be predicted.

    Raises:
        AlignmentError: if there are several penalties and nothing is held out to choose by.
    """
    best, _ = best_ridge(data.moments, data.heldout, data.ridge)
    return best


def cca(shape: HeadShape, data: FitData) -> Affine:
    """Canonical directions of the teacher put onto those of the student, with the student's covariance.

    Both sides are whitened, `U S Vᵀ = svd(Sxx^-½ Sxy Syy^-½)`, and `W = Sxx^-½ U Vᵀ Syy^½`: the canonical variates of
    Hotelling 1936, without the shrinkage by `S` that a regression has. Targets have the student's own mean and, where
    the teacher has as many directions, its covariance.
    """
    import torch

    moments = data.moments
    into, _ = _whitening(moments.cov_xx)
    own, back = _whitening(moments.cov_yy)
    u, _, vh = torch.linalg.svd(into.T @ moments.cov_xy @ own, full_matrices=False)
    weight = into @ u @ vh @ back
    return Affine(weight, moments.mean_y - moments.mean_x @ weight)


@dataclass(frozen=True)
class HeadMap:
    """A method and what it must see."""

    fit: Fit
    needs: Literal["nothing", "teacher", "student"]
    """`teacher`: second moments of the teacher's tensors; `student`: paired with the student's own."""
    by_head: bool = False
    """Each target head is made from the source heads that it overlaps in any case."""


HEAD_MAPS: Final[dict[str, HeadMap]] = {
    "identity": HeadMap(identity, "nothing", by_head=True),
    "mean": HeadMap(mean, "nothing", by_head=True),
    "random": HeadMap(random, "nothing"),
    "pca": HeadMap(pca, "teacher"),
    "procrustes": HeadMap(procrustes, "student"),
    "ridge": HeadMap(ridge, "student"),
    "cca": HeadMap(cca, "student"),
}


def fit_heads(method: HeadMap, shape: HeadShape, data: FitData, *, per: Literal["layer", "head"]) -> Affine:
    """Fits one student layer: all heads together, or each target head by itself.

    Args:
        method: one of `HEAD_MAPS`.
        shape: from what to what.
        data: what it is fitted on.
        per: `head` gives each target head a block from the source heads that it overlaps when both sets of heads are
            laid along one line (2 of 4 for each of 2; the same one for 2 of 4); the weight is zero outside of it.

    Raises:
        AlignmentError: if the method cannot map these shapes, or has nothing to choose by.
    """
    import torch

    if per == "layer" or method.by_head:
        return method.fit(shape, data)
    weight, bias = torch.zeros(shape.source_width, shape.target_width, dtype=torch.float64), _zeros(shape.target_width)
    overlap = _area(shape.source_heads, shape.target_heads)
    numbers = torch.arange(shape.source_width).view(shape.num_layers, shape.source_heads, shape.source_dim)
    penalties: list[float] = []
    for head in range(shape.target_heads):
        sources = overlap[:, head].nonzero()[:, 0]
        rows = numbers[:, sources].flatten()
        columns = torch.arange(head * shape.target_dim, (head + 1) * shape.target_dim)
        part = HeadShape(shape.num_layers, len(sources), shape.source_dim, 1, shape.target_dim)
        heldout = None if data.heldout is None else data.heldout.block(rows, columns)
        block = method.fit(part, FitData(data.moments.block(rows, columns), heldout, data.generator, data.ridge))
        weight[rows[:, None], columns] = block.weight
        bias[columns] = block.bias
        penalties += block.penalties
    return Affine(weight, bias, tuple(penalties))


def best_ridge(
    moments: Moments,
    heldout: Moments | None,
    penalties: Sequence[float],
    *,
    spectrum: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Affine, float | None]:
    """The ridge whose held-out R² is highest, and that R²; of equal ones the stronger penalty.

    Args:
        moments: to fit on.
        heldout: to choose by; None only if there is nothing to choose.
        penalties: relative to the mean variance of x.
        spectrum: eigenvalues and eigenvectors of `moments.cov_xx`, if they are known.

    Raises:
        AlignmentError: if there is something to choose and nothing is held out.
    """
    import torch

    if heldout is None and len(penalties) > 1:
        raise AlignmentError(
            f"project.ridge: choosing one of {len(penalties)} penalties needs held-out samples and there are none; "
            "give it 2 calibration samples at least, or one penalty"
        )
    values, vectors = torch.linalg.eigh(moments.cov_xx) if spectrum is None else spectrum
    rotated, level = vectors.T @ moments.cov_xy, float(values.clamp(min=0).mean()) or 1.0

    def fitted() -> Iterator[tuple[Affine, float | None]]:
        for penalty in sorted(penalties, reverse=True):
            weight = vectors @ (rotated / (values.clamp(min=0) + penalty * level).unsqueeze(1))
            bias = moments.mean_y - moments.mean_x @ weight
            yield Affine(weight, bias, (penalty,)), None if heldout is None else heldout.r2(weight, bias)

    return max(fitted(), key=lambda found: -float("inf") if found[1] is None else found[1])


def _zeros(width: int) -> torch.Tensor:
    import torch

    return torch.zeros(width, dtype=torch.float64)


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


def _whitening(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[p, r]` that makes the `r` directions that are not empty uncorrelated and of variance one, and back `[r, p]`."""
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    kept = values > CCA_EPSILON * values.clamp(min=0).mean()
    roots, basis = values[kept].sqrt(), vectors[:, kept]
    return basis / roots, (basis * roots).T
