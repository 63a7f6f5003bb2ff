"""One sample, and a padded batch of samples, in memory.

Axes: `t` tokens, `l` layers, `h` KV heads, `d` head_dim, `b` batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import torch


class Segment(IntEnum):
    """What a token belongs to."""

    NONE = 0
    """Template and special tokens."""
    PROMPT = 1
    RATIONALE = 2
    ANSWER = 3
    TURN = 4
    """Template tokens that an assistant writes itself: the end of its turn, and the marks around its reasoning. They
    are predicted and have no target."""


class Split(IntEnum):
    """What a sample is for."""

    TRAIN = 0
    HELDOUT = 1


SEGMENTS: Final = {segment.name.lower(): segment for segment in Segment if segment is not Segment.TURN}
"""Segments by name that a recipe can name and that coverage is counted for."""
SPLITS: Final = {split.name.lower(): split for split in Split}


@dataclass(frozen=True)
class KVSample:
    """The keys and values of one sample, with everything known of its tokens.

    Keys are pre-RoPE. `keys` and `values` are None where the caller did not ask for them.
    """

    sample_id: str
    split: Split
    keys: torch.Tensor | None
    """`[t, l, h, d]`, before rotary embedding."""
    values: torch.Tensor | None
    """`[t, l, h, d]`."""
    input_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    """`[t]`."""
    positions: np.ndarray[tuple[int], np.dtype[np.int32]]
    """`[t]`: the position ids that the model saw."""
    spans: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    """`[t, 2]`: UTF-8 byte range in the canonical text; empty for tokens that are not text."""
    segments: np.ndarray[tuple[int], np.dtype[np.uint8]]
    """`[t]`: see `Segment`."""
    mask: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """`[t]`: False where this token has no target."""
    extras: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """The arrays that the store's manifest declares: `[t, ...]`, or one entry of shape `[...]` for the sample. Empty
    where the caller did not ask for them."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that its tokens stand for."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


@dataclass(frozen=True)
class KVBatch:
    """Samples of unequal length, padded on the right; padding is zero and masked."""

    sample_ids: list[str]
    keys: torch.Tensor | None
    """`[b, t, l, h, d]`."""
    values: torch.Tensor | None
    """`[b, t, l, h, d]`."""
    input_ids: torch.Tensor
    """`[b, t]` int64."""
    attention_mask: torch.Tensor
    """`[b, t]` int64: 1 for tokens, 0 for padding."""
    positions: torch.Tensor
    """`[b, t]` int64."""
    segments: torch.Tensor
    """`[b, t]` uint8."""
    mask: torch.Tensor
    """`[b, t]` bool: token and has a target."""


def collate(samples: Sequence[KVSample], *, pad_token_id: int = 0) -> KVBatch:
    """Pads samples on the right into one batch."""
    import torch

    lengths = [len(s) for s in samples]
    size = (len(samples), max(lengths, default=0))

    def padded(name: str, dtype: torch.dtype, fill: int) -> torch.Tensor:
        out = torch.full(size, fill, dtype=dtype)
        for row, sample in enumerate(samples):
            out[row, : lengths[row]] = torch.from_numpy(np.ascontiguousarray(getattr(sample, name))).to(dtype)
        return out

    def padded_kv(name: str) -> torch.Tensor | None:
        rows = [getattr(sample, name) for sample in samples]
        if not rows or rows[0] is None:
            return None
        out = torch.zeros((*size, *rows[0].shape[1:]), dtype=rows[0].dtype)
        for row, tensor in enumerate(rows):
            out[row, : lengths[row]] = tensor
        return out

    attention = torch.zeros(size, dtype=torch.int64)
    for row, length in enumerate(lengths):
        attention[row, :length] = 1
    return KVBatch(
        sample_ids=[s.sample_id for s in samples],
        keys=padded_kv("keys"),
        values=padded_kv("values"),
        input_ids=padded("input_ids", torch.int64, pad_token_id),
        attention_mask=attention,
        positions=padded("positions", torch.int64, 0),
        segments=padded("segments", torch.uint8, 0),
        mask=padded("mask", torch.bool, 0),
    )
