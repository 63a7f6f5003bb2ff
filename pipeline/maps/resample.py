"""Time: from the teacher's tokens to the student's, as a sparse matrix with rows that sum to one.

A method is one function of two arrays of byte spans and one line in `RESAMPLERS`. A student token with no teacher token
is masked, never filled with zeros that would be a target; an index outside the source is an error, never clamped.
By default segments do not mix: prompt is read from prompt, rationale from rationale, answer from answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import AlignmentError
from ...store import SEGMENTS, Segment

if TYPE_CHECKING:
    import torch

    from ...extract import Tokens
    from ...store import KVSample

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TimeMap:
    """A row-stochastic matrix `W [num_target, num_source]` in coordinate form."""

    num_source: int
    num_target: int
    rows: Array
    """Target indices, ascending."""
    columns: Array
    """Source indices."""
    weights: Array
    """float64; those of one row sum to one."""

    def __post_init__(self) -> None:
        for name, indices, size in (("target", self.rows, self.num_target), ("source", self.columns, self.num_source)):
            if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
                worst = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
                raise AlignmentError(f"time map: {name} index {worst} is outside of {size} tokens")

    @property
    def mask(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """`[num_target]`: which target tokens have any source."""
        mask = np.zeros(self.num_target, np.bool_)
        mask[self.rows] = True
        return mask

    def apply(self, source: torch.Tensor) -> torch.Tensor:
        """`W @ source` along the first axis; masked rows are zero.

        Args:
            source: `[num_source, ...]`, floating point.

        Returns:
            `[num_target, ...]`: of the same dtype where every row has at most one source, which is exact; else sums in
            float32, or float64 if `source` is.

        Raises:
            AlignmentError: if `source` has another number of tokens.
        """
        import torch

        if source.shape[0] != self.num_source:
            raise AlignmentError(f"time map: made for {self.num_source} source tokens, got {source.shape[0]}")
        rows, columns = torch.from_numpy(self.rows), torch.from_numpy(self.columns)
        masked = torch.from_numpy(np.flatnonzero(~self.mask))
        if len(self.rows) and len(self.rows) + len(masked) == self.num_target:
            # Rows without a source read any and are zeroed: one copy, and nothing to fill beforehand.
            place = torch.zeros(self.num_target, dtype=torch.int64)
            place[rows] = columns
            return source.index_select(0, place).index_fill_(0, masked, 0)
        dtype = torch.promote_types(source.dtype, torch.float32)
        weights = torch.from_numpy(self.weights).to(dtype).view(-1, *[1] * (source.dim() - 1))
        out = torch.zeros((self.num_target, *source.shape[1:]), dtype=dtype)
        return out.index_add_(0, rows, source[columns].to(dtype) * weights)

    def dense(self) -> Array:
        """`W` as a float64 matrix."""
        matrix = np.zeros((self.num_target, self.num_source))
        matrix[self.rows, self.columns] = self.weights
        return matrix


def last(source_spans: Array, target_spans: Array) -> TimeMap:
    """The last source token that ends at or before the target token's end: it has read no byte the student has not."""
    source, target = _content(source_spans), _content(target_spans)
    chosen = np.searchsorted(source_spans[source, 1], target_spans[target, 1], side="right") - 1
    found = chosen >= 0
    return _one_each(source_spans, target_spans, target[found], source[chosen[found]])


def mean(source_spans: Array, target_spans: Array) -> TimeMap:
    """All source tokens that share bytes with the target token, weighted by how many.

    The last of them may reach beyond the target token's end.
    """
    source, target = _content(source_spans), _content(target_spans)
    starts, stops = source_spans[source].T if len(source) else (np.zeros(0, int), np.zeros(0, int))
    first = np.searchsorted(stops, target_spans[target, 0], side="right")
    end = np.searchsorted(starts, target_spans[target, 1], side="left")
    count = np.maximum(end - first, 0)
    rows = np.repeat(target, count)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    columns = source[np.repeat(first, count) + offset] if len(rows) else np.zeros(0, int)
    shared = np.minimum(source_spans[columns, 1], target_spans[rows, 1]) - np.maximum(
        source_spans[columns, 0], target_spans[rows, 0]
    )
    total = np.bincount(rows, weights=shared, minlength=len(target_spans))
    return TimeMap(len(source_spans), len(target_spans), rows, columns, shared / total[rows])


def linear(source_spans: Array, target_spans: Array) -> TimeMap:
    """Interpolation by index among the tokens that are text, endpoints exact; spans only say which those are."""
    source, target = _content(source_spans), _content(target_spans)
    rows, columns, weights = linear_weights(len(source), len(target))
    return TimeMap(len(source_spans), len(target_spans), target[rows], source[columns], weights)


def nearest(source_spans: Array, target_spans: Array) -> TimeMap:
    """The token nearest by index among those that are text, endpoints exact; a tie goes to the earlier one."""
    source, target = _content(source_spans), _content(target_spans)
    place = _places(len(source), len(target))
    rows = np.arange(len(place))
    return _one_each(source_spans, target_spans, target[rows], source[np.ceil(place - 0.5).astype(np.int64)])


RESAMPLERS: Final[dict[str, Callable[[Array, Array], TimeMap]]] = {
    "last": last,
    "mean": mean,
    "linear": linear,
    "nearest": nearest,
}


def time_map(
    method: str, source: KVSample | Tokens, target: KVSample | Tokens, *, across_segments: bool = False
) -> TimeMap:
    """From the tokens of `source` to those of `target`, two tokenisations of one text.

    Args:
        method: a name in `RESAMPLERS`.
        source: the teacher's tokens, with byte spans and segments.
        target: the student's.
        across_segments: also let a token be read from another segment; otherwise each segment is mapped by itself, and
            its first tokens are masked where no source token of it ends early enough.
    """
    resample = RESAMPLERS[method]
    if across_segments:
        return resample(source.spans, target.spans)
    kinds = [kind for kind in SEGMENTS.values() if kind != Segment.NONE and (target.segments == kind).any()]
    maps = [resample(_only(source, kind), _only(target, kind)) for kind in kinds]
    rows, columns, weights = (
        np.concatenate([getattr(m, name) for m in maps] or [np.zeros(0, dtype)])
        for name, dtype in (("rows", np.int64), ("columns", np.int64), ("weights", np.float64))
    )
    order = np.argsort(rows, kind="stable")  # A text may come back to a segment: chats do.
    return TimeMap(len(source), len(target), rows[order], columns[order], weights[order])


def coverage(time: TimeMap, source: KVSample | Tokens, target: KVSample | Tokens) -> Array:
    """How well two tokenisations meet: counts `[segments, 3]` of the target's text tokens.

    All of them; those with any source token; those whose end is the end of a source token too.
    """
    text = target.spans[:, 1] > target.spans[:, 0]
    together = np.isin(target.spans[:, 1], source.spans[_content(source.spans), 1])
    counts = [text, text & time.mask, text & together]
    return np.stack([np.bincount(target.segments[c], minlength=len(SEGMENTS)) for c in counts], axis=1)


def linear_weights(num_source: int, num_target: int) -> tuple[Array, Array, Array]:
    """Rows, columns and weights of linear interpolation with `s_i = i (T - 1) / (M - 1)`; the last token for M = 1."""
    place = _places(num_source, num_target)
    low = np.floor(place).astype(np.int64)
    part = place - low
    rows = np.arange(len(place))
    between = part > 0
    columns = np.stack([low, low + 1], axis=1)
    weights = np.stack([1 - part, part], axis=1)
    keep = np.stack([np.ones(len(place), np.bool_), between], axis=1)
    return np.repeat(rows, 2).reshape(-1, 2)[keep], columns[keep], weights[keep]


def identity_map(num_tokens: int, mask: Array) -> TimeMap:
    """Every token that has a target to itself."""
    kept = np.flatnonzero(mask)
    return TimeMap(num_tokens, num_tokens, kept, kept, np.ones(len(kept)))


def _places(num_source: int, num_target: int) -> Array:
    if num_source == 0:
        return np.zeros(0)
    if num_target == 1:
        return np.array([num_source - 1.0])
    # Whole-number arithmetic up to one division: the endpoints and every coincidence are exact.
    return np.arange(num_target) * (num_source - 1) / (num_target - 1)


def _only(tokens: KVSample | Tokens, kind: Segment) -> Array:
    """The spans, empty for tokens of other segments."""
    return np.where((tokens.segments == kind)[:, None], tokens.spans, 0)


def _content(spans: Array) -> Array:
    return np.flatnonzero(spans[:, 1] > spans[:, 0])


def _one_each(source_spans: Array, target_spans: Array, rows: Array, columns: Array) -> TimeMap:
    return TimeMap(len(source_spans), len(target_spans), rows, columns, np.ones(len(rows)))
