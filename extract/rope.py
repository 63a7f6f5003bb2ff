"""Rotary position embedding: undoing it, and doing it, in float32.

Rotation turns pairs of dimensions of a key by an angle that grows with its position (Su et al. 2021, "RoFormer",
https://arxiv.org/abs/2104.09864). The table is the model's own, read from the module that rotates, because scaled
variants (YaRN, LongRoPE) multiply cosine and sine by a factor and half-precision models round them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..tap import decoder

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


def rotary_tables(config: Any, positions: torch.Tensor) -> list[RotaryTable]:
    """What each layer of a Hugging Face model rotates its keys and queries with, in float32.

    Read from the model's own rotary module and function, and proved on random keys.

    Args:
        config: the model's config.
        positions: `[t]` int64: the position ids of one forward pass, all of them: dynamic scaling and LongRoPE choose
            their frequencies by the largest.

    Returns:
        One table for each layer, of those positions.

    Raises:
        UnsupportedModelError: if the model does not turn pairs of dimensions by its positions.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = decoder(AutoModelForCausalLM.from_config(config))
    if not hasattr(base, "rotary_emb"):
        raise UnsupportedModelError(f"{type(base).__name__} has no rotary embedding where kava looks for it")
    rotary = type(base.rotary_emb)(base.config)
    rotate = sys.modules[type(base).__module__].apply_rotary_pos_emb
    kinds = getattr(base.config, "layer_types", None) or [""] * base.config.num_hidden_layers
    per_kind = isinstance(next(iter(base.config.rope_parameters.values())), dict)
    tables: dict[str, RotaryTable] = {}
    for kind in kinds if per_kind else [""]:
        if kind not in tables:
            extra = (kind,) if per_kind else ()
            cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None], *extra)
            tables[kind] = _read_table(rotate, cos, sin)
    return [tables[kind if per_kind else ""] for kind in kinds]


def _read_table(rotate: Any, cos: torch.Tensor, sin: torch.Tensor) -> RotaryTable:
    """From a model's cosines and sines `[1, t, rotary_dim]`, by letting its function turn ones."""
    import torch

    tokens, width = cos.shape[1:]

    def turn(keys: torch.Tensor) -> torch.Tensor:
        heads = keys.transpose(0, 1)[None]
        out: torch.Tensor = rotate(heads, heads, cos, sin)[1][0].transpose(0, 1)
        return out

    keys = torch.randn(tokens, 1, width, generator=torch.Generator().manual_seed(0))
    for interleaved in (False, True):
        first = slice(0, width, 2) if interleaved else slice(0, width // 2)
        second = slice(1, width, 2) if interleaved else slice(width // 2, width)
        ones = torch.zeros(tokens, 1, width)
        ones[..., first] = 1
        read = turn(ones)[:, 0]
        table = RotaryTable(read[:, first].contiguous(), read[:, second].contiguous(), interleaved)
        if torch.allclose(table.rotate(keys), turn(keys), rtol=1e-5, atol=1e-5):
            return table
    raise UnsupportedModelError("the model does not rotate pairs of dimensions")
