"""Where a paged KV cache keeps each number: learned from the engine's own writer, believed of nobody.

vLLM's layouts differ by attention backend and changed four times in a year. So nothing here knows any of them: numbers
that say where they belong are written through the backend's own cache update, found again in memory, and the map from
(key or value, slot, head, dimension) to memory is read off. Random numbers then prove it, layer by layer, in the first,
the second and the last block. What cannot be read back exactly (a quantised cache, say) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ...errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    """Writes keys and values `[t, h, d]` to slots `[t]` of a cache, as the engine does."""

_BASE: Final = 128
"""Digits are 1 to 128, which every float type holds exactly."""


@dataclass(frozen=True)
class CacheLayout:
    """The map from (key or value, slot, head, dimension) to a place in the storage of one layer's cache."""

    block_size: int
    """Slots in one block."""
    block_stride: int
    """Numbers from one block to the next."""
    offsets: torch.Tensor
    """`[2, block_size, h, d]` int64: places in the first block, counted from the cache's first number."""
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None
    """For keys and values: strides of (slot, head, dimension), if the places are evenly spaced."""

    def read(self, cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[t, h, d]` of the slots `[t]`, copied out of a layer's cache."""
        blocks, inside = slots // self.block_size, slots % self.block_size
        if self.strides is None:
            flat = cache.as_strided((_reach(cache),), (1,))
            places = self.offsets.to(cache.device)[:, inside] + (blocks * self.block_stride)[:, None, None]
            keys, values = flat[places]
            return keys, values
        keys, values = (view[blocks, inside] for view in self._views(cache))
        return keys, values

    def _views(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.strides is not None
        _, size, heads, head_dim = self.offsets.shape
        starts = [int(self.offsets[i, 0, 0, 0]) for i in range(2)]
        blocks = self._num_blocks(cache)
        keys, values = (
            cache.as_strided(
                (blocks, size, heads, head_dim), (self.block_stride, *strides), cache.storage_offset() + start
            )
            for strides, start in zip(self.strides, starts, strict=True)
        )
        return keys, values

    def _num_blocks(self, cache: torch.Tensor) -> int:
        return (_reach(cache) - 1 - int(self.offsets.max())) // self.block_stride + 1


def learn_layout(cache: torch.Tensor, write: Write, *, block_size: int, heads: int, head_dim: int) -> CacheLayout:
    """Finds out where `write` puts things.

    Args:
        cache: the cache of one layer, of which nothing is in use yet; it is cleared.
        write: the engine's own cache update for this cache.
        block_size: slots in one block of the engine's scheduler.
        heads: KV heads in this cache.
        head_dim: their width.

    Raises:
        UnsupportedModelError: if the numbers cannot be found again.
    """
    import torch

    slots = torch.arange(2 * block_size, device=cache.device)
    shape = (2, 2 * block_size, heads, head_dim)
    count = 2 * 2 * block_size * heads * head_dim
    numbers = torch.arange(count, device=cache.device).view(shape)
    cache.zero_()
    places: tuple[torch.Tensor, ...] = ()
    found = torch.zeros(0, dtype=torch.int64)
    scale = 1
    while scale < count:
        digits = (numbers // scale % _BASE + 1).to(cache.dtype)
        write(digits[0], digits[1], slots)
        if not places:
            places = _nonzero(cache)
            found = torch.zeros_like(places[0])
        found += (cache[places].to(torch.int64) - 1) * scale
        scale *= _BASE
    cache.zero_()
    if len(found) != count or not torch.equal(found.sort().values, numbers.flatten()):
        raise UnsupportedModelError(
            f"the KV cache ({tuple(cache.shape)}, {cache.dtype}) does not hold keys and values as they are: of {count} "
            f"numbers written, {len(found)} were found again. Is it quantised? Leave kv_cache_dtype at auto"
        )
    where = sum((index * stride for index, stride in zip(places, cache.stride(), strict=True)), start=0)
    offsets = torch.empty(count, dtype=torch.int64, device=cache.device)
    offsets[found] = where
    offsets = offsets.view(shape).cpu()
    for size in _halvings(block_size):  # The kernel's blocks may be smaller than the scheduler's.
        stride = int(offsets[0, size, 0, 0] - offsets[0, 0, 0, 0])
        steps = torch.arange(2 * block_size // size)[None, :, None, None, None] * stride
        pieces = offsets.view(2, -1, size, heads, head_dim)
        strides = _spacing(pieces[:, 0])
        if strides is not None and torch.equal(pieces, pieces[:, :1] + steps):
            return CacheLayout(size, stride, pieces[:, 0].clone(), strides)
    stride = int(offsets[0, block_size, 0, 0] - offsets[0, 0, 0, 0])
    layout = CacheLayout(block_size, stride, offsets[:, :block_size].clone(), None)
    if not torch.equal(offsets[:, block_size:], layout.offsets + stride):
        raise UnsupportedModelError(f"the KV cache ({tuple(cache.shape)}) has blocks that are not laid out alike")
    return layout


def prove_layout(layout: CacheLayout, cache: torch.Tensor, write: Write, *, block_size: int, num_blocks: int) -> None:
    """Writes random numbers to the first, second and last block, and reads them back through `layout`.

    Raises:
        UnsupportedModelError: if they are not exactly the same.
    """
    import torch

    _, _, heads, head_dim = layout.offsets.shape
    inside = torch.arange(block_size, device=cache.device)
    slots = torch.cat([block * block_size + inside for block in sorted({0, 1, num_blocks - 1})])
    slots = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0)).to(slots.device)]
    generator = torch.Generator().manual_seed(len(slots))
    keys, values = torch.randn((2, len(slots), heads, head_dim), generator=generator).to(cache.device, cache.dtype)
    write(keys, values, slots)
    read = layout.read(cache, slots)
    write(torch.zeros_like(keys), torch.zeros_like(values), slots)
    if not (torch.equal(read[0], keys) and torch.equal(read[1], values)):
        raise UnsupportedModelError(
            f"the KV cache ({tuple(cache.shape)}, {cache.dtype}) gives back other numbers than were written to it"
        )


def _spacing(offsets: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Strides of (slot, head, dimension) of keys and values `[2, slots, h, d]`, if they are evenly spaced."""
    import torch

    found = []
    for part in offsets:
        strides = []
        expected = part[:1, :1, :1]
        for axis, length in enumerate(part.shape):
            index = [0, 0, 0]
            index[axis] = min(1, length - 1)
            strides.append(int(part[tuple(index)] - part[0, 0, 0]))
            shape = [1, 1, 1]
            shape[axis] = length
            expected = expected + torch.arange(length).view(shape) * strides[-1]
        if not torch.equal(part, expected) or min(strides) < 0:
            return None
        found.append(tuple(strides))
    return found[0], found[1]


def _halvings(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def _nonzero(cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`torch.nonzero`, in pieces: CUDA's takes no more than 2^31 numbers."""
    import torch

    axis = max(range(cache.dim()), key=lambda i: cache.shape[i])
    length = max(1, cache.shape[axis] * (1 << 28) // cache.numel())
    found = []
    for number, piece in enumerate(torch.split(cache, length, axis)):
        index = torch.nonzero(piece)
        index[:, axis] += number * length
        found.append(index)
    return torch.cat(found).unbind(1)


def _reach(cache: torch.Tensor) -> int:
    """Numbers from the first of a cache to the end of its storage."""
    return int(cache.untyped_storage().nbytes() // cache.element_size() - cache.storage_offset())
