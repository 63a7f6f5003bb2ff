"""What a teacher is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..store import KVGeometry
from .tokens import Tokens

if TYPE_CHECKING:
    import torch


class Teacher(Protocol):
    """Anything that computes keys and values of token sequences by teacher-forced prefill."""

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width of what `capture` returns."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model can read."""
        ...

    def capture(self, batch: Sequence[Tokens]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pre-RoPE keys and values `[t, l, h, d]` of each sequence, without padding, on the CPU."""
        ...
