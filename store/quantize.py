"""Lossy codecs: keys and values as small integers.

After KIVI (Liu et al. 2024, https://arxiv.org/abs/2402.02750): a few channels of the keys are large in every token, so
keys share a scale along the tokens of a page, for each channel its own; values have no such channels and share one
along the channels of a token. A number is `scale * code + min`, computed in float32 and rounded to the store's dtype.
The first tokens of a sample, on which attention heaps up (sinks: Xiao et al. 2023, https://arxiv.org/abs/2309.17453),
are kept as they are. Rows behind a sample's end have no part in any scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .dtypes import DType

if TYPE_CHECKING:
    import torch

EXACT_TOKENS: Final = 4
"""First tokens of a sample that are kept exactly."""

_SHARED_AXIS: Final = {"keys": 0, "values": -1}
"""Of a page `[t, l, h, d]`: the axis along which numbers share a scale."""


@dataclass(frozen=True)
class QuantizedArray:
    """One of the arrays that stand for keys or values; a page of tokens is one chunk of it."""

    rows: int
    """Rows of one chunk."""
    entry: tuple[int, ...]
    """Shape of one row."""
    dtype: str
    """NumPy dtype of the bytes on disk."""
    fill_value: int | float
    """Zarr's."""
    meaning: str
    """The dtype of the numbers, as the array's attribute says it."""
    axes: tuple[str, ...]
    """Dimension names."""


@dataclass(frozen=True)
class Quantizer:
    """Asymmetric quantisation of keys per page and channel, of values per token and head."""

    name: str
    bits: int
    """Of a code: 8, or 4, of which two share a byte, the even channel in its low half."""

    def arrays(self, name: str, shape: tuple[int, ...], page: int, dtype: DType) -> dict[str, QuantizedArray]:
        """The arrays that stand for `name`, by their names.

        Args:
            name: `keys` or `values`.
            shape: `(l, h, d)`.
            page: tokens of a page.
            dtype: of the store.
        """
        layers, heads, width = shape
        kv = ("layer", "head", "dim")
        number = (dtype.numpy, dtype.fill_value, dtype.name)
        byte = ("|u1", 0, "uint8")
        codes = (layers, heads, -(-width * self.bits // 8))
        steps = (1, shape, *number, ("page", *kv)) if name == "keys" else (page, shape[:2], *number, ("token", *kv[:2]))
        return {
            f"{name}_q": QuantizedArray(page, codes, *byte, ("token", *kv[:2], "dim" if self.bits == 8 else "pair")),
            f"{name}_scale": QuantizedArray(*steps),
            f"{name}_min": QuantizedArray(*steps),
            f"{name}_exact": QuantizedArray(_exact(page), shape, *number, ("token", *kv)),
        }

    def encode(
        self, name: str, array: np.ndarray[Any, Any], page: int, dtype: DType
    ) -> dict[str, np.ndarray[Any, Any]]:
        """A sample's `keys` or `values` `[t, l, h, d]` as the arrays that stand for them, in whole pages.

        A scale is the smallest number of the store's dtype with which the codes span the numbers that share it, so that
        no decoded number is further than half of it from the true one, but for the rounding to the store's dtype. The
        smallest of those numbers is exact. Both are zero where nothing is quantised.
        """
        import torch

        tokens, pages = len(array), -(-len(array) // page)
        kinds = self.arrays(name, array.shape[1:], page, dtype)
        out = {n: np.zeros((pages * kind.rows, *kind.entry), kind.dtype) for n, kind in kinds.items()}
        source, exact = dtype.to_torch(array), min(tokens, _exact(page))
        out[f"{name}_exact"][:exact] = array[:exact]
        scales, lows = (dtype.to_torch(out[f"{name}_{what}"]) for what in ("scale", "min"))
        for number in range(pages):
            first, stop = max(number * page, exact), min((number + 1) * page, tokens)
            if first >= stop:
                continue
            rows = source[first:stop].float()
            low, high = rows.aminmax(dim=_SHARED_AXIS[name], keepdim=True)
            scale = _step(high - low, 2**self.bits - 1, dtype)
            codes = rows.sub(low).div_(torch.where(scale > 0, scale, 1)).round_().to(torch.uint8)
            out[f"{name}_q"][first:stop] = self._pack(codes.numpy())
            where = slice(number, number + 1) if name == "keys" else slice(first, stop)
            scales[where], lows[where] = (t.view(scales[where].shape) for t in (scale, low))
        return out

    def decode(
        self, name: str, arrays: Mapping[str, np.ndarray[Any, Any]], tokens: int, page: int, dtype: DType
    ) -> np.ndarray[Any, Any]:
        """The `keys` or `values` `[t, l, h, d]` of a sample of that many tokens, in the on-disk dtype.

        Args:
            name: `keys` or `values`.
            arrays: of the sample's pages, or of `{name}_exact` only of its first.
            tokens: of the sample.
            page: tokens of a page.
            dtype: of the store.
        """
        first_rows = arrays[f"{name}_exact"]
        out = np.empty((tokens, *first_rows.shape[1:]), dtype.numpy)
        for number, first in enumerate(range(0, tokens, page)):
            stop, steps = first + page, slice(number, number + 1) if name == "keys" else slice(first, first + page)
            stored = {
                f"{name}_q": arrays[f"{name}_q"][first:stop],
                f"{name}_scale": arrays[f"{name}_scale"][steps],
                f"{name}_min": arrays[f"{name}_min"][steps],
            }
            if not first:
                stored[f"{name}_exact"] = first_rows
            self.decode_page(name, stored, out[first:stop], page, dtype)
        return out

    def decode_page(
        self,
        name: str,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        out: np.ndarray[Any, Any],
        page: int,
        dtype: DType,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Decodes the rows of one page.

        Args:
            name: `keys` or `values`.
            arrays: the page's, with `{name}_exact` for the first page of a sample alone.
            out: the first rows of the page `[t, l, h, d]`, on-disk dtype.
            page: tokens of a page.
            dtype: of the store.
            layers: which of the layers `out` holds; None for all.
        """
        import torch

        tokens, numbers = len(out), dtype.to_torch(out)
        scale, low = (dtype.to_torch(arrays[f"{name}_{what}"])[:tokens] for what in ("scale", "min"))
        codes = torch.from_numpy(arrays[f"{name}_q"])[:tokens]
        if layers is not None:
            scale, low, codes = (t[:, list(layers)] for t in (scale, low, codes))
        if name == "values":
            scale, low = scale.unsqueeze(-1), low.unsqueeze(-1)
        numbers.copy_(self._unpack(codes, out.shape[-1]).mul_(scale.float()).add_(low.float()))
        if (first_rows := arrays.get(f"{name}_exact")) is not None:
            exact = min(tokens, _exact(page))
            out[:exact] = first_rows[:exact] if layers is None else first_rows[:exact, list(layers)]

    def round_trip(self, name: str, tensor: torch.Tensor, page: int, dtype: DType) -> torch.Tensor:
        """What a store hands out of the `keys` or `values` `[t, l, h, d]` that were written to it."""
        encoded = self.encode(name, dtype.to_numpy(tensor), page, dtype)
        return dtype.to_torch(self.decode(name, encoded, len(tensor), page, dtype))

    def _pack(self, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.bits == 8:
            return codes
        packed = codes[..., ::2].copy()
        packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
        return packed

    def _unpack(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        import torch

        if self.bits == 8:
            return packed.float()
        codes = torch.empty((*packed.shape[:-1], width))
        codes[..., ::2] = packed & 15
        codes[..., 1::2] = (packed >> 4)[..., : width // 2]
        return codes


LOSSY: Final[dict[str, Quantizer]] = {"int8": Quantizer("int8", 8), "int4": Quantizer("int4", 4)}


def _exact(page: int) -> int:
    return min(EXACT_TOKENS, page)


def _step(spread: torch.Tensor, steps: int, dtype: DType) -> torch.Tensor:
    """The smallest number of `dtype`, as float32, of which that many steps reach across `spread`."""
    import torch

    scale = (spread / steps).to(dtype.torch_dtype)
    bits = scale.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    bits += (scale.float() * steps < spread).to(bits.dtype)  # The next number up, as none is negative.
    return scale.float()
