"""A student's own attention on a text, replayed layer by layer with other keys and values in place of its own.

How near the outputs stay to the student's own says more of a projection than R² does: in Heo et al. 2026
(https://arxiv.org/abs/2608.03893) their cosine predicts what a transferred cache retains, and R² does not.

Axes: `t` tokens, `h` KV heads, `a` attention heads, `d` head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...errors import UnsupportedModelError
from ...extract.rope import RotaryTable, forget_longest_pass, rotary_tables
from ...tap import KVTap, attention_layout, decoder, sliding_window

if TYPE_CHECKING:
    import torch

TOLERANCE: Final = 1e-3
"""Of the replay's relative RMS error against the model: a model that attends in another way is refused."""


class AttentionReplay:
    """One text under one model: queries, keys and values before rotary embedding, and what attention makes of them."""

    def __init__(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Runs the model once.

        Args:
            model: a Hugging Face causal LM.
            input_ids: `[t]` int64.
            positions: `[t]` int64.

        Raises:
            UnsupportedModelError: if the replay is not what the model computes.
        """
        import torch

        self._attentions = [layer.self_attn for layer in decoder(model).layers]
        self._tables: list[RotaryTable] = rotary_tables(model.config, positions)
        device = next(model.parameters()).device
        self._own: list[torch.Tensor] = []
        handles = [self._projection(a).register_forward_pre_hook(self._keep) for a in self._attentions]
        try:
            forget_longest_pass(model)
            with torch.no_grad(), KVTap(model, queries=True) as tap:
                decoder(model)(
                    input_ids=input_ids[None].to(device), position_ids=positions[None].to(device), use_cache=False
                )
        finally:
            for handle in handles:
                handle.remove()
        layers = range(len(self._attentions))
        self.queries, self.keys, self.values = (
            [found[index][0].float().cpu() for index in layers] for found in (tap.queries, tap.keys, tap.values)
        )
        for index in layers:
            replayed, own = self.output(index, self.keys[index], self.values[index]).flatten(1), self._own[index]
            if not (replayed - own).square().mean() <= TOLERANCE**2 * own.square().mean():
                raise UnsupportedModelError(
                    f"{type(model).__name__}: layer {index} does not attend as kava computes it; its attention cannot "
                    "be replayed with other keys and values"
                )

    def output(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What the layer's heads read: `softmax(scaling q kᵀ) v`, causal, with the model's rotation.

        Args:
            layer: of the model.
            keys: `[t, h, d]` float32, before rotary embedding.
            values: `[t, h, d]` float32.

        Returns:
            `[t, a, d]` float32, as the output projection gets it.
        """
        import torch

        attention, table = self._attentions[layer], self._tables[layer]
        queries = table.rotate(self.queries[layer])
        tokens, groups = len(queries), queries.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (table.rotate(keys), values))
        scores = torch.einsum("qad,kad->aqk", queries, keys) * attention.scaling
        if cap := getattr(attention, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / cap) * cap
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        hidden = distance < 0
        if window := sliding_window(attention):
            hidden = hidden | (distance >= window)
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("aqk,kad->qad", shares, values)

    def cosines(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """How near attention stays to the student's own with targets in the place of its keys and values.

        Tokens without a target keep the student's own.

        Args:
            keys: `[t, l, h, d]`: targets.
            values: `[t, l, h, d]`: targets.
            mask: `[t]` bool: tokens that have one.

        Returns:
            `[l]`: cosine of what each head reads, mean over heads and over queries of tokens that have a target.
        """
        import torch

        kept = mask[:, None, None]
        found = []
        for layer, (own_keys, own_values) in enumerate(zip(self.keys, self.values, strict=True)):
            own = self.output(layer, own_keys, own_values)
            made = self.output(
                layer,
                torch.where(kept, keys[:, layer].float(), own_keys),
                torch.where(kept, values[:, layer].float(), own_values),
            )
            found.append(torch.cosine_similarity(own[mask], made[mask], dim=-1).mean())
        return torch.stack(found)

    def _keep(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._own.append(args[0][0].float().cpu())

    def _projection(self, attention: Any) -> Any:
        output = attention_layout(attention.config).output
        if not hasattr(attention, output) or not hasattr(attention, "scaling"):
            raise UnsupportedModelError(
                f"{type(attention).__name__} has no {output} or scaling where kava looks for them"
            )
        return getattr(attention, output)
