"""What a forward pass tells beside keys and values: what the answer attends to, how sure the model is, what comes next.

All are computed from what the pass holds anyway, sample by sample, so that padding never enters. They cost time only
where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import RecipeError, UnsupportedModelError
from ..store import LOGITS, ExtraArray, KVGeometry, Segment
from ..tap import KVTap, decoder, sliding_window
from .rope import RotaryTable, rotary_tables
from .tokens import Tokens

if TYPE_CHECKING:
    import torch

BLOCK_BYTES: Final = 256 << 20
"""Float32 bytes of logits, over the vocabulary or over keys, that are held at once, at most."""

CONFIDENCE: Final = ("nats", "predicted_tokens", "text_bytes", "entropy")
"""Per sample: summed loss of the predicted tokens, their number and bytes, mean entropy of what predicts them."""

Extras = dict[str, np.ndarray[Any, Any]]


def signal_arrays(
    geometry: KVGeometry, *, importance: bool, confidence: bool, logits: int | None = None
) -> dict[str, ExtraArray]:
    """The extra arrays of a capture with these signals."""
    heads = (geometry.num_layers, geometry.num_key_value_heads)
    found = {"importance": ExtraArray(axis="row", dtype="float32", shape=heads)} if importance else {}
    if logits is not None:
        shapes = (("int32", (logits,)), ("float32", (logits,)), ("float32", ()))
        kinds = [ExtraArray.model_validate({"axis": "row", "dtype": dtype, "shape": shape}) for dtype, shape in shapes]
        found |= dict(zip(LOGITS, kinds, strict=True))
    return found | (dict.fromkeys(CONFIDENCE, ExtraArray(axis="sample", dtype="float64")) if confidence else {})


@dataclass
class Signals:
    """Computes the signals of a model's forward passes.

    Raises:
        UnsupportedModelError: with `confidence` or `logits`, if it is not known what the model does to its logits.
        RecipeError: if there are not so many `logits`.
    """

    model: Any
    importance: bool = False
    confidence: bool = False
    logits: int | None = None
    """How many of the likeliest next tokens are kept of every token's distribution."""

    def __post_init__(self) -> None:
        if self.logits is not None and self.logits > (vocabulary := int(self.model.config.vocab_size)):
            raise RecipeError(f"extract.logits: {self.logits} is more than the {vocabulary} that the model has")
        if self.confidence or self.logits is not None:
            self._prove_head()
        self._tables = lru_cache(maxsize=32)(self._read_tables)

    def compute(
        self, tap: KVTap, hidden: torch.Tensor, batch: Sequence[Tokens], cuts: Sequence[slice]
    ) -> list[dict[str, torch.Tensor]]:
        """The signals of one forward pass, on its device; `extras` makes arrays of them.

        Args:
            tap: with queries, if `importance` is wanted.
            hidden: `[b, t, hidden_size]`: the decoder's output.
            batch: the samples.
            cuts: where in its row each sample's tokens are.

        Returns:
            For each sample, in float32: `importance` `[rationale tokens, l, h]`, not there without rationale or answer;
            `nll` and `entropies` `[predicted tokens]`; `LOGITS` `[t, k]` or `[t]`, ids in int64.
        """
        found: list[dict[str, torch.Tensor]] = [{} for _ in batch]
        if self.importance:
            tables = self._tables(max(int(tokens.positions.max()) for tokens in batch) + 1)
            for row, (tokens, cut) in enumerate(zip(batch, cuts, strict=True)):
                if (weights := self._attention(tap, row, tokens, cut, tables)) is not None:
                    found[row]["importance"] = weights
        if self.confidence:
            for row, (tokens, cut) in enumerate(zip(batch, cuts, strict=True)):
                places = predicted(tokens)
                targets = _index(tokens.input_ids[places], hidden)
                before = hidden[row, _index(places - 1 + cut.start, hidden)]
                found[row]["nll"], found[row]["entropies"] = self._losses(before, targets)
        if self.logits is not None:
            for row, cut in enumerate(cuts):
                found[row] |= dict(zip(LOGITS, self._likeliest(hidden[row, cut], self.logits), strict=True))
        return found

    def extras(self, tokens: Tokens, found: dict[str, torch.Tensor], geometry: KVGeometry) -> Extras:
        """The extra arrays of one sample, as `signal_arrays` declares them, from its signals on the CPU."""
        out: Extras = {}
        if self.importance:
            heads = (geometry.num_layers, geometry.num_key_value_heads)
            out["importance"] = np.full((len(tokens), *heads), np.nan, np.float32)
            if "importance" in found:
                out["importance"][tokens.segments == Segment.RATIONALE] = found["importance"].numpy()
        if self.confidence:
            places = predicted(tokens)
            entropies = found["entropies"].double()
            numbers = (
                found["nll"].double().sum(),
                len(places),
                np.diff(tokens.spans[places]).sum(),
                entropies.mean() if len(places) else np.nan,
            )
            out |= {name: np.asarray(float(number)) for name, number in zip(CONFIDENCE, numbers, strict=True)}
        if self.logits is not None:
            out |= {name: found[name].numpy() for name in LOGITS}
            out["logit_ids"] = out["logit_ids"].astype(np.int32)
        return out

    def _attention(
        self, tap: KVTap, row: int, tokens: Tokens, cut: slice, tables: list[RotaryTable]
    ) -> torch.Tensor | None:
        """`[rationale tokens, l, h]`; None for a sample without a rationale or without an answer."""
        import torch

        asking, asked = (np.flatnonzero(tokens.segments == kind) for kind in (Segment.ANSWER, Segment.RATIONALE))
        if not len(asking) or not len(asked):
            return None
        sides = [(places, _index(places + cut.start, tap.keys[0])) for places in (asking, asked)]
        turns: dict[int, list[RotaryTable]] = {}
        out = []
        for layer, block in enumerate(decoder(self.model).layers):
            table, attention = tables[layer], block.self_attn
            if id(table) not in turns:  # Layers of one kind share their table.
                turns[id(table)] = [_rows(table, tokens.positions[places], tap.keys[0]) for places, _ in sides]
            (_, at_answer), (_, at_rationale) = sides
            queries = turns[id(table)][0].rotate(tap.queries[layer][row, at_answer].float())
            keys = turns[id(table)][1].rotate(tap.keys[layer][row, at_rationale].float())
            visible = _visible(asking, asked, sliding_window(attention))
            scale, cap = float(attention.scaling), getattr(attention, "attn_logit_softcapping", None)
            out.append(answer_attention(queries, keys, visible.to(keys.device), scale=scale, softcap=cap))
        return torch.stack(out, dim=1)

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and entropy `[n]` in nats of the next-token distributions at `hidden` `[n, hidden_size]`."""
        import torch

        rows = max(1, BLOCK_BYTES // (4 * int(self.model.config.vocab_size)))
        losses, entropies = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
        for first in range(0, len(hidden), rows):
            logs = self._logits(hidden[first : first + rows]).log_softmax(-1)
            losses.append(-logs.gather(1, targets[first : first + rows, None])[:, 0])
            entropies.append(-(logs.exp() * logs).sum(-1))
        return torch.cat(losses), torch.cat(entropies)

    def _likeliest(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
        """What `LOGITS` says, of the next-token distributions at `hidden` `[n, hidden_size]`."""
        import torch

        rows = max(1, BLOCK_BYTES // (4 * int(self.model.config.vocab_size)))
        blocks = []
        for first in range(0, len(hidden), rows):
            logs = self._logits(hidden[first : first + rows]).log_softmax(-1)
            best = logs.topk(k)
            # Summed, not one minus the others: of a sure teacher that difference would be nothing but rounding.
            tail = logs.scatter(1, best.indices, float("-inf")).logsumexp(-1)
            blocks.append((best.indices, best.values, tail))
        return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits in float32: its head, and what its config says is done to them."""
        import torch

        config = self.model.config
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden).float()
        if factor := getattr(config, "logit_scale", None):
            logits = logits * factor
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _prove_head(self) -> None:
        import torch

        device = next(self.model.parameters()).device
        ids = torch.arange(8, device=device)[None] % int(self.model.config.vocab_size)
        with torch.inference_mode():
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            found = self._logits(decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state)
        if (own - found).abs().max() > 0.02 * own.abs().max():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does something to its logits that kava does not know; "
                "set extract.confidence: false, and leave extract.logits out"
            )

    def _read_tables(self, count: int) -> list[RotaryTable]:
        import torch

        return rotary_tables(self.model.config, torch.arange(count))


def predicted(tokens: Tokens) -> np.ndarray[Any, Any]:
    """The tokens whose prediction is scored: those that are text, but for the first of the sequence.

    Nothing is read before that one. Of a tokenizer whose spans are not exact, tokens inside one character count once.
    """
    places = np.flatnonzero(tokens.spans[:, 1] > tokens.spans[:, 0])
    return places[places > 0]


def answer_attention(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, *, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """How much the answer attends to each rationale token: KaVa's importance (arXiv 2510.02312, eviction).

    Logits before the softmax, the largest of the query heads that share a KV head, softmax over the rationale tokens
    alone, mean over the answer tokens. An answer token that can see none of them is left out; where none can see any,
    all is zero.

    Args:
        queries: `[a, num_attention_heads, d]` float32 of the answer tokens, rotated.
        keys: `[r, h, d]` float32 of the rationale tokens, rotated.
        visible: `[a, r]` bool: what the model's mask lets through.
        scale: of the logits.
        softcap: `c` of `c tanh(logits / c)`, where the model has it.

    Returns:
        `[r, h]` float32; each head sums to one, or to zero.
    """
    import torch

    heads = keys.shape[1]
    groups = queries.shape[1] // heads
    rows = max(1, BLOCK_BYTES // (4 * queries.shape[1] * keys.shape[0]))
    queries, visible = (tensor[visible.any(1)] for tensor in (queries, visible))
    total = keys.new_zeros(keys.shape[:2])
    for first in range(0, len(queries), rows):
        block = queries[first : first + rows]
        block = block.view(len(block), heads, groups, -1)
        logits = torch.einsum("ahgd,rhd->ahgr", block, keys) * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.amax(2).masked_fill(~visible[first : first + rows, None], float("-inf"))
        total += logits.softmax(-1).sum(0).T
    return total / max(len(queries), 1)


def _visible(asking: np.ndarray[Any, Any], asked: np.ndarray[Any, Any], window: int | None) -> torch.Tensor:
    """`[a, r]`: causal, and inside the layer's sliding window."""
    import torch

    distance = asking[:, None] - asked[None, :]
    return torch.from_numpy((distance >= 0) & (distance < window if window else True))


def _rows(table: RotaryTable, positions: np.ndarray[Any, Any], like: torch.Tensor) -> RotaryTable:
    import torch

    rows = table.at(torch.from_numpy(positions).long())
    return RotaryTable(rows.cos.to(like.device), rows.sin.to(like.device), rows.interleaved)


def _index(places: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(places).to(like.device, torch.int64)
