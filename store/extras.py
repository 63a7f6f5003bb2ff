"""Arrays that a store holds beside keys, values and tokens, as its manifest declares them.

An extra with a number for every row lies in pages and shards as keys and values do, so that a sample's are read alone;
one with a number for every sample is a small array. What they mean is the business of whoever declares them.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import StoreError

if TYPE_CHECKING:
    from .sample import KVSample

RESERVED: Final = frozenset(
    {"keys", "values", "tokens", "start", "length", "split", "sample_id"}
    | {"input_ids", "positions", "spans", "segments", "mask"}  # Fields of a sample.
    | {f"{name}_{part}" for name in ("keys", "values") for part in ("q", "scale", "min", "exact")}
)
"""Names of the arrays that every part has."""


LOGITS: Final = ("logit_ids", "logprobs", "logprob_tail")
"""Of rows: the likeliest next tokens `[k]`, likeliest first, their log-probabilities `[k]` in nats over the whole
vocabulary, and that of all others together. Id -1 and NaN where the teacher read no such token."""


MAX_AXES: Final = 8
"""Upper bound of the axes of one entry; NumPy allows 64 in all, kava declares 2 at most."""

MAX_ENTRY_BYTES: Final = 16 << 20
"""Upper bound of the bytes of one entry: slots of 4,096 heads with 1,024 numbers each."""


class ExtraArray(BaseModel):
    """What an extra array looks like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: Literal["row", "sample"]
    """What there is one entry for."""
    dtype: Literal["float32", "float64", "int32"]
    shape: Annotated[tuple[Annotated[int, Field(gt=0, le=MAX_ENTRY_BYTES)], ...], Field(max_length=MAX_AXES)] = ()
    """Of one entry: `(layers, kv_heads)`, or `()` for a number."""

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.entry_bytes > MAX_ENTRY_BYTES:
            raise ValueError(f"shape {self.shape} has {self.entry_bytes:,} bytes, at most {MAX_ENTRY_BYTES:,} are read")
        return self

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def numpy(self) -> str:
        """The little-endian NumPy dtype."""
        return np.dtype(self.dtype).newbyteorder("<").str

    @property
    def fill_value(self) -> int | float:
        """What stands for nothing: NaN, or -1."""
        return -1 if self.dtype == "int32" else float("nan")

    @property
    def dimension_names(self) -> list[str]:
        """Of the array in a part: its first axis, then those of an entry."""
        inner = ["layer", "head"] if len(self.shape) == 2 else [f"axis_{n}" for n in range(len(self.shape))]
        return ["token" if self.axis == "row" else "sample", *inner]


def check_names(extras: dict[str, ExtraArray]) -> None:
    """Checks that each name can be that of an array in a part.

    Raises:
        ValueError: if one cannot.
    """
    for name in extras:
        if name in RESERVED or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"extra array {name!r}: a name is of a-z, 0-9 and _, and not that of another array")


def checked_extras(sample: KVSample, declared: dict[str, ExtraArray]) -> dict[str, np.ndarray[Any, Any]]:
    """The extra arrays of a sample in their on-disk dtype.

    Raises:
        StoreError: if one is missing or not declared, or has another shape or dtype than declared.
    """
    if sample.extras.keys() != declared.keys():
        raise StoreError(
            f"sample {sample.sample_id!r}: has the extra arrays {sorted(sample.extras)}, "
            f"the store holds {sorted(declared)}"
        )
    for name, kind in declared.items():
        array = sample.extras[name]
        expected = (*([len(sample)] if kind.axis == "row" else []), *kind.shape)
        if array.shape != expected or array.dtype != kind.dtype:
            raise StoreError(
                f"sample {sample.sample_id!r}: {name} is {array.dtype} {array.shape}, "
                f"the store holds {kind.dtype} {expected}"
            )
    return {name: sample.extras[name].astype(kind.numpy, copy=False) for name, kind in declared.items()}
