"""What a teacher is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from ..store import KVGeometry
from .tokens import Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Captured:
    """Keys and values of one sample, on the CPU."""

    index: int
    """Of the sample in the sequence that was given to `capture`."""
    keys: torch.Tensor
    """`[t, l, h, d]`, before rotary embedding, without padding."""
    values: torch.Tensor
    """`[t, l, h, d]`."""
    extras: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Signals of the forward pass, as the store's manifest declares them."""


class Teacher(Protocol):
    """Anything that computes keys and values of token sequences by teacher-forced prefill.

    A context manager: leaving it frees the model, or stops the engine.
    """

    backend: str
    """What computes, and its version: `hf 5.19.0`."""

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width of what `capture` returns."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model can read."""
        ...

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        """Computes every sample once, in an order of its own; the next is under way while one is looked at."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
