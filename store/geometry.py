"""The shape of one token's keys or values."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

MAX_LAYERS: Final = 4096
"""Upper bound of layers, and of KV heads: the deepest and widest published models have a few hundred."""

MAX_HEAD_DIM: Final = 65_536
"""Upper bound of the head width: 128 to 576 are common, and one head of the whole hidden size is conceivable."""


class KVGeometry(BaseModel):
    """Layers, KV heads and head width of a KV cache.

    These are counted on tensors, never derived from `num_attention_heads` or `hidden_size`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    num_key_value_heads: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    head_dim: Annotated[int, Field(gt=0, le=MAX_HEAD_DIM)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(num_layers, num_key_value_heads, head_dim)`: the trailing axes of stored keys and values."""
        return (self.num_layers, self.num_key_value_heads, self.head_dim)

    @property
    def width(self) -> int:
        """Numbers per token and layer in the keys (or in the values): `num_key_value_heads * head_dim`."""
        return self.num_key_value_heads * self.head_dim

    def bytes_per_token(self, itemsize: int) -> int:
        """Raw bytes of one token's keys and values together."""
        return 2 * self.num_layers * self.width * itemsize

    def __str__(self) -> str:
        return f"{self.num_layers} layers x {self.num_key_value_heads} KV heads x {self.head_dim}"
