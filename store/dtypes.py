"""The three storage dtypes and the one place where tensors and arrays turn into each other.

Zarr has no bfloat16, so its bits are stored as uint16 and the manifest says what they mean. The fill value is NaN in
every dtype: a chunk that went missing can never be read as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import StoreError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A storage dtype."""

    name: str
    """The torch name: `bfloat16`, `float16` or `float32`."""
    numpy: str
    """The little-endian NumPy dtype of the bytes on disk."""
    fill_value: int | float
    """NaN, as the Zarr fill value of the on-disk dtype."""

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return np.dtype(self.numpy).itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        import torch

        dtype = getattr(torch, self.name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_numpy(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """The tensor, cast to this dtype, as the array of on-disk dtype (bfloat16 as its uint16 bits)."""
        import torch

        tensor = tensor.detach().to("cpu", self.torch_dtype).contiguous()
        if self.name == "bfloat16":
            return np.asarray(tensor.view(torch.int16).numpy().view(np.uint16))
        return np.asarray(tensor.numpy())

    def to_torch(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """The on-disk array as a tensor of this dtype; shares memory with `array`."""
        import torch

        if self.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def fill_float32(self, out: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
        """The same as `to_float32`, into memory that is there already."""
        import torch

        torch.from_numpy(out).copy_(self.to_torch(array))

    def to_float32(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The on-disk array as float32 numbers (exact for all three dtypes)."""
        return np.asarray(self.to_torch(array).float().numpy())


DTYPES: Final[dict[str, DType]] = {
    "bfloat16": DType("bfloat16", "<u2", 0xFFFF),
    "float16": DType("float16", "<f2", float("nan")),
    "float32": DType("float32", "<f4", float("nan")),
}


def dtype_of(name: str) -> DType:
    """The storage dtype of this name.

    Raises:
        StoreError: if there is none.
    """
    if name not in DTYPES:
        raise StoreError(f"storage dtype {name!r} is unknown: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
