"""Rotary position embedding: undoing it, and doing it, in float32.

Rotation turns pairs of dimensions of a key by an angle that grows with its position (Su et al. 2021, "RoFormer",
https://arxiv.org/abs/2104.09864). The table is the model's own, read from the module that rotates, because scaled
variants (YaRN, LongRoPE) multiply cosine and sine by a factor and half-precision models round them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines as a model applies them: of every position, or `at` those of the keys in hand."""

    cos: torch.Tensor
    """`[t, rotary_dim / 2]` float32."""
    sin: torch.Tensor
    """`[t, rotary_dim / 2]` float32."""
    interleaved: bool = False
    """Pairs are dimensions `(2i, 2i + 1)` (GPT-J) instead of `(i, i + rotary_dim / 2)` (GPT-NeoX, Llama)."""

    def at(self, positions: torch.Tensor) -> RotaryTable:
        """The rows of these positions `[t]`."""
        return RotaryTable(self.cos[positions], self.sin[positions], self.interleaved)

    def rotate(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `[t, h, d]` float32, turned by their rows; dimensions past `rotary_dim` stay as they are."""
        return self._turned(keys, self.cos, self.sin)

    def unrotate(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys that `rotate` turns into these: `(k cos - rotate_half(k) sin) / (cos² + sin²)`."""
        return self._turned(keys, *self._inverse)

    @cached_property
    def _inverse(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.cos.square() + self.sin.square()
        return self.cos / norm, -self.sin / norm

    def _turned(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.empty_like(keys)
        width = 2 * cos.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        (a, b), (out_a, out_b) = self._pairs(keys[..., :width]), self._pairs(out[..., :width])
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
        out[..., width:] = keys[..., width:]
        return out

    def _pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.interleaved:
            return keys[..., ::2], keys[..., 1::2]
        half = keys.shape[-1] // 2
        return keys[..., :half], keys[..., half:]
