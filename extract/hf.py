"""A teacher under Hugging Face transformers: one padded forward pass, hooks on every attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..hub import ModelSource, load_model
from ..store import KVGeometry
from ..tap import KVTap, decoder, probe_geometry
from .tokens import Tokens

if TYPE_CHECKING:
    import torch


class HFTeacher:
    """A loaded model that captures its own pre-RoPE keys and values."""

    def __init__(self, model: Any, *, padding_side: Literal["left", "right"] = "right") -> None:
        self.model, self.padding_side = model, padding_side
        self.geometry: KVGeometry = probe_geometry(model)

    @classmethod
    def load(cls, source: ModelSource, *, dtype: str, device: str = "auto") -> HFTeacher:
        """Loads the model.

        Raises:
            ModelNotFoundError: if it cannot be loaded.
            UnsupportedModelError: if its architecture is not known.
        """
        return cls(load_model(source, dtype=dtype, device=device))

    @property
    def max_tokens(self) -> int:
        """`max_position_embeddings` of the model's config."""
        return int(self.model.config.max_position_embeddings)

    def capture(self, batch: Sequence[Tokens]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pre-RoPE keys and values of each sequence, `[t, l, h, d]` on the CPU, in the model's dtype.

        The language-model head is not run. Padding is masked and not returned.
        """
        import torch

        device = next(self.model.parameters()).device
        longest = max(len(tokens) for tokens in batch)
        ids, mask, positions = (torch.zeros((len(batch), longest), dtype=torch.int64) for _ in range(3))
        rows = []
        for row, tokens in enumerate(batch):
            start = longest - len(tokens) if self.padding_side == "left" else 0
            rows.append(slice(start, start + len(tokens)))
            ids[row, rows[row]] = torch.from_numpy(tokens.input_ids).to(torch.int64)
            positions[row, rows[row]] = torch.from_numpy(tokens.positions).to(torch.int64)
            mask[row, rows[row]] = 1
        with torch.inference_mode(), KVTap(self.model) as tap:
            decoder(self.model)(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                use_cache=False,
            )
            keys, values = (tensor.to("cpu") for tensor in tap.stack())
        return [(keys[row, cut].clone(), values[row, cut].clone()) for row, cut in enumerate(rows)]
