"""Sums from which every linear fit follows: float64, streamed over samples, so memory does not grow with the corpus.

A `Gram` holds the sums of the blocks that a fit needs; `Moments` are the means and covariances of one map's rows, taken
from it. Every fifth sample is held out: a `Calibration` has the sums of both sides after one pass.

Axes: `p` numbers of a teacher layer (or of several, joined), `q` numbers of a student layer, `n` rows (tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ...errors import AlignmentError
from ...store import KVGeometry
from .layers import LayerMap

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]
"""Keys and values, each `[t, l, h, d]`."""
NAMES: Final = ("keys", "values")
HELD_OUT: Final = 5
"""One calibration sample in this many is held out."""


def is_held_out(number: int) -> bool:
    """Whether a calibration sample, counted from 0 in the order of the fit, is held out: the second of every five.

    Two samples are then one to fit on and one to measure on; with a single one nothing is held out.
    """
    return number % HELD_OUT == 1


@dataclass(frozen=True)
class Moments:
    """Means and covariances of paired rows `x [n, p]` and `y [n, q]`; `q` is 0 where there is no student."""

    count: int
    mean_x: torch.Tensor
    """`[p]`."""
    mean_y: torch.Tensor
    """`[q]`."""
    cov_xx: torch.Tensor
    """`[p, p]`."""
    cov_xy: torch.Tensor
    """`[p, q]`."""
    cov_yy: torch.Tensor
    """`[q, q]`."""

    @classmethod
    def empty(cls, p: int, q: int) -> Moments:
        """Of no rows, for maps that look at none."""
        import torch

        x, y = torch.zeros(p, dtype=torch.float64), torch.zeros(q, dtype=torch.float64)
        return cls(0, x, y, x.expand(p, p), x[:, None].expand(p, q), y.expand(q, q))

    @property
    def has_student(self) -> bool:
        """Whether there is a y."""
        return len(self.mean_y) > 0

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> Moments:
        """Those of some numbers of x and some of y."""
        if not self.has_student:
            columns = columns[:0]
        return Moments(
            self.count,
            self.mean_x[rows],
            self.mean_y[columns],
            self.cov_xx[rows][:, rows],
            self.cov_xy[rows][:, columns],
            self.cov_yy[columns][:, columns],
        )

    def with_y(self, shift: torch.Tensor, factor: float) -> Moments:
        """Those of x and `(y - shift) * factor`."""
        return Moments(
            self.count,
            self.mean_x,
            (self.mean_y - shift) * factor,
            self.cov_xx,
            self.cov_xy * factor,
            self.cov_yy * factor**2,
        )

    def r2(self, weight: torch.Tensor, bias: torch.Tensor) -> float | None:
        """R² of `x weight + bias` for y, over all its numbers together, from the moments alone.

        `SSE_j / n = Syy_jj - 2 (W ⊙ Sxy)_j + (W ⊙ Sxx W)_j + (mean y - mean x W - b)_j²`; None where y does not vary.
        """
        error = self.cov_yy.trace() - 2 * (weight * self.cov_xy).sum() + (weight * (self.cov_xx @ weight)).sum()
        shift = self.mean_y - self.mean_x @ weight - bias
        total = self.cov_yy.trace()
        return float(1 - (error + shift @ shift) / total) if total > 0 else None

    @property
    def cka(self) -> float:
        """Linear centred kernel alignment, `‖Sxy‖² / (‖Sxx‖ ‖Syy‖)` in Frobenius norms; 0 where a side is constant.

        Kornblith et al. 2019, https://arxiv.org/abs/1905.00414. It ignores rotations and scales of either side. This
        is the plain estimator: between unrelated sides it tends to 0 as rows grow beyond `p` and `q`.
        """
        norms = self.cov_xx.norm() * self.cov_yy.norm()
        return float(self.cov_xy.square().sum() / norms) if norms > 0 else 0.0


@dataclass(frozen=True)
class Wanted:
    """The blocks of second moments that a fit needs."""

    joined: frozenset[tuple[int, int]]
    """Pairs of teacher layers, the lower first; with itself too."""
    cross: frozenset[tuple[int, int]]
    """A teacher and a student layer."""

    @classmethod
    def for_map(cls, layers: LayerMap) -> Wanted:
        """What a map from these layers needs."""
        joined = {(min(a, b), max(a, b)) for sources in layers for a in sources for b in sources}
        return cls(frozenset(joined), frozenset((a, j) for j, sources in enumerate(layers) for a in sources))

    @classmethod
    def for_cka(cls, source: KVGeometry, target: KVGeometry) -> Wanted:
        """Every teacher layer with every student layer."""
        layers = range(source.num_layers)
        cross = ((i, j) for i in layers for j in range(target.num_layers))
        return cls(frozenset((i, i) for i in layers), frozenset(cross))

    @classmethod
    def for_search(cls, source: KVGeometry, target: KVGeometry) -> Wanted:
        """Also every teacher layer with every other, so that any of them can be joined."""
        layers = range(source.num_layers)
        joined = frozenset((a, b) for a in layers for b in layers if a <= b)
        return cls(joined, cls.for_cka(source, target).cross)

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.joined | other.joined, self.cross | other.cross)


class Gram:
    """Streamed sums of the wanted blocks, in float64.

    Memory is `8 (p² |joined| + p q |cross|)` bytes, whatever the number of rows.
    """

    def __init__(self, source: KVGeometry, target: KVGeometry | None, wanted: Wanted) -> None:
        """Starts at no rows; without a target only the teacher's moments are kept."""
        import torch

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        p = source.width
        q, student_layers = (0, 0) if target is None else (target.width, target.num_layers)
        self.count = 0
        self._x, self._y = zeros(source.num_layers, p), zeros(student_layers, q)
        self._partners = _grouped(wanted.joined)
        self._students = {} if target is None else _grouped(wanted.cross)
        self._xx = {i: zeros(p, len(others), p) for i, others in self._partners.items()}
        self._xy = {i: zeros(p, len(others), q) for i, others in self._students.items()}
        self._yy = {j: zeros(q, q) for others in self._students.values() for j in others}

    @property
    def has_every_pair(self) -> bool:
        """Whether each teacher layer was gathered with each student layer."""
        return bool(self._students) and sum(map(len, self._students.values())) == len(self._x) * len(self._y)

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Adds rows: x `[n, l, p]` of the teacher, y `[n, l, q]` of the student."""
        x = x.double()
        self.count += len(x)
        self._x += x.sum(0)
        for i, partners in self._partners.items():
            self._xx[i].flatten(1).addmm_(x[:, i].T, x[:, partners].flatten(1))
        if not self._students:
            return
        assert y is not None
        y = y.double()
        self._y += y.sum(0)
        for i, students in self._students.items():
            self._xy[i].flatten(1).addmm_(x[:, i].T, y[:, students].flatten(1))
        for j, total in self._yy.items():
            total.addmm_(y[:, j].T, y[:, j])

    def moments(self, sources: Sequence[int], target: int) -> Moments:
        """Of these teacher layers, joined, and a student layer."""
        import torch

        n = max(self.count, 1)
        mean_x = self._x[list(sources)].flatten() / n
        xx = torch.cat([torch.cat([self._joined(a, b) for b in sources], dim=1) for a in sources])
        if not self._students:
            none = mean_x.new_zeros(0)
            return Moments(self.count, mean_x, none, xx / n - mean_x.outer(mean_x), xx[:, :0], none[None][:0])
        mean_y = self._y[target] / n
        xy = torch.cat([self._xy[a][:, self._students[a].index(target)] for a in sources])
        return Moments(
            self.count,
            mean_x,
            mean_y,
            xx / n - mean_x.outer(mean_x),
            xy / n - mean_x.outer(mean_y),
            self._yy[target] / n - mean_y.outer(mean_y),
        )

    def _joined(self, a: int, b: int) -> torch.Tensor:
        low, high = min(a, b), max(a, b)
        block = self._xx[low][:, self._partners[low].index(high)]
        return block if a <= b else block.T


@dataclass
class Calibration:
    """What a projector is fitted on, and what it is measured on."""

    fit: dict[str, Gram]
    """`keys` and `values` of the samples that are not held out."""
    heldout: dict[str, Gram]
    """Of those that are."""
    samples: dict[str, int] = field(default_factory=lambda: {"fit": 0, "heldout": 0})

    @classmethod
    def gather(
        cls,
        source: KVGeometry,
        target: KVGeometry | None,
        wanted: Wanted,
        pairs: Iterable[tuple[Pair, Pair | None] | None],
    ) -> Calibration:
        """Reads the pairs of the teacher's and the student's own tensors once, in order.

        Args:
            source: the teacher's geometry.
            target: the student's; None to look at the teacher alone.
            wanted: blocks to keep.
            pairs: one of each sample, only rows that have a target; None for a sample that failed.

        Raises:
            AlignmentError: if the student's are wanted and not there.
        """
        fit, heldout = ({name: Gram(source, target, wanted) for name in NAMES} for _ in range(2))
        found = cls(fit, heldout)
        for number, pair in enumerate(pairs):
            if pair is None:
                continue
            teacher, student = pair
            side = "heldout" if is_held_out(number) else "fit"
            found.samples[side] += 1
            if target is not None and student is None:
                raise AlignmentError(
                    "this projection is fitted against the student's own keys and values: give them too"
                )
            for kind, name in enumerate(NAMES):
                y = None if student is None or target is None else student[kind].flatten(2)
                (heldout if side == "heldout" else fit)[name].add(teacher[kind].flatten(2), y)
        return found

    @property
    def tokens(self) -> dict[str, int]:
        """Rows of either side."""
        return {"fit": self.fit["keys"].count, "heldout": self.heldout["keys"].count}

    def moments(self, name: str, sources: Sequence[int], target: int) -> tuple[Moments, Moments | None]:
        """Of the rows to fit on, and of the held-out ones if there are any."""
        held = self.heldout[name]
        return self.fit[name].moments(sources, target), held.moments(sources, target) if held.count else None


def _grouped(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for first, second in sorted(pairs):
        out.setdefault(first, []).append(second)
    return out
