"""Rotary position embedding: undoing it, and doing it, in float32.

Rotation turns pairs of dimensions of a key by an angle that grows with its position (Su et al. 2021, "RoFormer",
https://arxiv.org/abs/2104.09864). The table is the model's own, read from the module that rotates, because scaled
variants (YaRN, LongRoPE) multiply cosine and sine by a factor and half-precision models round them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from ..errors import AlignmentError, UnsupportedModelError
from ..hub import meta_model
from ..tap import attention_layout, decoder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines as a layer applies them: of every position, or `at` those of the keys in hand.

    A layer that does not rotate has a table of `rotary_dim` 0, which changes nothing.
    """

    cos: torch.Tensor
    """`[t, rotary_dim / 2]` float32."""
    sin: torch.Tensor
    """`[t, rotary_dim / 2]` float32."""
    interleaved: bool = False
    """Pairs are dimensions `(2i, 2i + 1)` (GPT-J) instead of `(i, i + rotary_dim / 2)` (GPT-NeoX, Llama)."""

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are turned: the first ones."""
        return 2 * self.cos.shape[-1]

    def to(self, device: torch.device) -> RotaryTable:
        """The same table on another device."""
        return RotaryTable(self.cos.to(device), self.sin.to(device), self.interleaved)

    def at(self, positions: torch.Tensor) -> RotaryTable:
        """The rows of these positions `[t]`."""
        return RotaryTable(self.cos[positions], self.sin[positions], self.interleaved)

    def rotate(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `[t, h, d]` float32, turned by their rows; dimensions past `rotary_dim` stay as they are."""
        return self._turned(keys, self.cos, self.sin)

    def unrotate(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys that `rotate` turns into these: `(k cos - rotate_half(k) sin) / (cos² + sin²)`."""
        return self._turned(keys, *self._inverse)

    def differs(self, other: RotaryTable, eps: float) -> str | None:
        """What tells this table of positions 0, 1, ... from another, if it is more than rounding.

        Args:
            other: the table to compare with, on the same device.
            eps: of the dtype in which either was computed; angles are products of float32 numbers.
        """
        if (self.rotary_dim, self.interleaved) != (other.rotary_dim, other.interleaved):
            kinds = [("interleaved" if t.interleaved else "half and half", t.rotary_dim) for t in (self, other)]
            return f"turns {kinds[0][1]} dimensions {kinds[0][0]}, not {kinds[1][1]} {kinds[1][0]} like that"
        import torch

        off = torch.maximum((self.cos - other.cos).abs(), (self.sin - other.sin).abs()).amax(-1)
        allowed = 2 * eps + 5e-7 * torch.arange(len(off), device=off.device)
        wrong = (off > allowed).nonzero()
        if not len(wrong):
            return None
        return f"has another table: at position {wrong[0].item()} it is {off[wrong[0]].item():.1e} off that"

    @cached_property
    def _inverse(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.cos.square() + self.sin.square()
        return self.cos / norm, -self.sin / norm

    def _turned(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.empty_like(keys)
        width = self.rotary_dim
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

    Read from the model's own rotary module and function, and proved on random keys: every rope_type that
    transformers knows, partial and interleaved rotation, tables that differ by kind of layer, layers without rotation.

    Args:
        config: the model's config.
        positions: `[t]` integers: the position ids of one forward pass, all of them: dynamic NTK scaling and LongRoPE
            choose their frequencies by the largest.

    Returns:
        One table for each layer, of those positions, on the CPU.

    Raises:
        AlignmentError: if the positions are not `[t]` integers from 0 on.
        UnsupportedModelError: if the architecture is not known, or does not turn pairs of dimensions by its positions.
    """
    import torch

    _check_positions(positions)
    layout, base = attention_layout(config), decoder(meta_model(config))
    rotary = type(base.rotary_emb)(base.config)
    rotate = sys.modules[type(base).__module__].apply_rotary_pos_emb
    unrotated = RotaryTable(*torch.zeros(2, len(positions), 0))
    tables: dict[tuple[str, ...], RotaryTable] = {}
    found = []
    for layer, kind in zip(base.layers, _kinds(base.config), strict=True):
        if not layout.rotates(layer.self_attn):
            found.append(unrotated)
            continue
        if kind not in tables:
            cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions.cpu()[None], *kind)
            tables[kind] = _read_table(rotate, cos, sin)
        found.append(tables[kind])
    return found


def unrotate_cache(
    config: Any, keys: torch.Tensor, positions: torch.Tensor, *, forwards: Sequence[int] | None = None
) -> torch.Tensor:
    """Pre-RoPE keys from those that a Hugging Face model cached for one sequence.

    For caches that exist already; kava's own capture reads keys before they are rotated. The sequence must have been
    computed alone, or without longer neighbours, by a model that saw no longer one before: under dynamic NTK scaling
    and LongRoPE those too decide on the frequencies, and a cache does not say so.

    Args:
        config: the model's config.
        keys: `[t, l, h, d]` of any float dtype: the keys of a `DynamicCache`, its layers stacked.
        positions: `[t]` integers: the position ids that the model saw.
        forwards: how many of the tokens came with each forward pass, in their order: `[t]` for one prefill (the
            default), `[t - 2, 1, 1]` for a prefill and two decoded tokens.

    Returns:
        `[t, l, h, d]` float32, on the device of `keys`.

    Raises:
        AlignmentError: if keys, positions, forward passes and the model's layers do not fit each other.
        UnsupportedModelError: if the architecture is not known, or its frequencies changed between two of the forward
            passes, so that no one table turns the keys back.
    """
    import torch

    if keys.dim() != 4 or positions.shape != keys.shape[:1]:
        raise AlignmentError(
            f"keys must be [t, l, h, d] and positions [t], got {tuple(keys.shape)} and {tuple(positions.shape)}"
        )
    _check_positions(positions)
    forwards = [len(keys)] if forwards is None else list(forwards)
    if sum(forwards) != len(keys) or min(forwards, default=1) < 1:
        raise AlignmentError(f"forward passes of {forwards} tokens do not make up {len(keys)} keys")
    lengths = [int(piece.max()) + 1 for piece in torch.split(positions, forwards)]
    if len({frequency_class(config, length) for length in lengths}) > 1:
        kinds = sorted({str(parameters.get("rope_type")) for parameters in rope_parameters(config)})
        raise UnsupportedModelError(
            f"these keys cannot be un-rotated: between forward passes that reached {lengths[0]} and {lengths[-1]} "
            f"positions, rope_type {', '.join(kinds)} changed its frequencies, and cached keys keep those of their own "
            "pass. Compute the sequence in one forward pass, or capture it with kava"
        )
    tables = rotary_tables(config, positions)
    if len(tables) != keys.shape[1]:
        raise AlignmentError(f"keys of {keys.shape[1]} layers, the model has {len(tables)}")
    pairs = zip(tables, keys.unbind(1), strict=True)
    layers = [table.to(keys.device).unrotate(layer.float()) for table, layer in pairs]
    return torch.stack(layers, dim=1)


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a config: one set, or one for each kind of layer."""
    stated = getattr(config, "rope_parameters", None) or {}
    return [value for value in stated.values() if isinstance(value, dict)] or [stated]


MODEL_LIMIT: Final = "max_position_embeddings and rope scaling of its config"
"""What limits a sequence to `max_positions`, for messages."""


def max_positions(config: Any) -> int:
    """Return how many tokens a model reads: `max_position_embeddings`, or more where its rotation is scaled.

    YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071) reaches `factor` times
    `original_max_position_embeddings`, also where `max_position_embeddings` was left at the original length, as Qwen2.5
    and Qwen3 say to do. Dynamic NTK scaling reaches `factor` times `max_position_embeddings`.
    """
    stated, reached = int(config.max_position_embeddings), []
    for parameters in rope_parameters(config):
        kind, factor = parameters.get("rope_type"), parameters.get("factor")
        if kind in ("yarn", "dynamic") and factor is not None:
            original = parameters.get("original_max_position_embeddings") if kind == "yarn" else None
            reached.append(int(factor * (original or stated)))
    return min(reached, default=stated)


def frequency_class(config: Any, length: int) -> tuple[int, ...]:
    """What a forward pass over positions 0 to `length - 1` chooses its frequencies by.

    Passes of equal class rotate alike. Under dynamic NTK scaling (bloc97 and emozilla 2023,
    `base (f L / L_max - (f - 1))^(d / (d - 2))`) every length `L` past `max_position_embeddings` is a class of its own;
    LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753) has one set of factors up to
    `original_max_position_embeddings` and another beyond; everything else is one class.
    """
    found = []
    for parameters in rope_parameters(config):
        kind, chosen = parameters.get("rope_type"), 0
        if kind == "dynamic":
            chosen = max(length, int(config.max_position_embeddings))
        elif kind == "longrope":
            chosen = int(length > parameters["original_max_position_embeddings"])
        found.append(chosen)
    return tuple(found)


def forget_longest_pass(model: Any) -> None:
    """Makes a model choose its frequencies by the coming forward pass alone.

    Under dynamic NTK scaling, transformers keeps those of the longest pass until one comes that is shorter than
    `max_position_embeddings`: here, one of a single position through its rotary module.
    """
    base = decoder(model)
    if all(parameters.get("rope_type") != "dynamic" for parameters in rope_parameters(base.config)):
        return
    import torch

    device = next(model.parameters()).device
    for kind in set(_kinds(base.config)):
        base.rotary_emb(torch.zeros(1, device=device), torch.zeros((1, 1), dtype=torch.int64, device=device), *kind)


def _kinds(config: Any) -> list[tuple[str, ...]]:
    """For each layer, what the rotary module must be told beside the positions: its kind, where kinds differ."""
    if any(isinstance(value, dict) for value in config.rope_parameters.values()):
        return [(kind,) for kind in config.layer_types]
    return [()] * int(config.num_hidden_layers)


def _check_positions(positions: torch.Tensor) -> None:
    if positions.dim() != 1 or not len(positions) or positions.is_floating_point() or bool((positions < 0).any()):
        raise AlignmentError(
            f"positions must be [t] integers from 0 on, got {positions.dtype} {tuple(positions.shape)}"
            + (f", the smallest {positions.min().item()}" if positions.numel() else "")
        )


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
