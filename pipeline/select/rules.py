"""Slots: `M` of a sample's tokens, for each layer and KV head its own, chosen by a score.

A method is one function that scores every token and one line in `SELECTORS`; the best `M` are kept in the order of
the text. A sample with fewer tokens fills fewer slots: the others are empty, never filled with repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ...errors import AlignmentError
from ...store import digest_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Candidates:
    """The tokens of one sample that may be chosen; `n` of them."""

    sample_id: str
    keys: torch.Tensor
    """`[n, l, h, d]`."""
    importance: torch.Tensor | None
    """`[n, l, h]`: see `extract.signals.answer_attention`."""


@dataclass(frozen=True)
class Selector:
    """How to choose."""

    method: str
    """A name in `SELECTORS`."""
    tokens: int
    """`M`."""
    mix_lambda: float = 0.1
    """Share of importance in the score of `r-kv`, the rest is dissimilarity."""
    mix: Literal["sum", "zscore"] = "sum"
    """Mix the two as they are, or standardised over the tokens first."""
    seed: int = 0
    """Of `random`."""

    @property
    def needs_importance(self) -> bool:
        """Whether the score looks at the answer's attention."""
        return SELECTORS[self.method].needs_importance and (self.method != "r-kv" or self.mix_lambda > 0)

    @property
    def compares_keys(self) -> bool:
        """Whether the score looks at keys."""
        return SELECTORS[self.method].compares_keys and (self.method != "r-kv" or self.mix_lambda < 1)

    def __call__(self, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses `m = min(M, n)` of the candidates for each layer and head.

        Equal scores go to the earlier token.

        Returns:
            `[m, l, h]` int64, ascending along the first axis: which candidates; `[m, l, h]` float64: their scores.

        Raises:
            AlignmentError: if the method needs importance and there is none.
        """
        if self.needs_importance and candidates.importance is None:
            raise AlignmentError(f"select: {self.method} needs importance, sample {candidates.sample_id!r} has none")
        scores = SELECTORS[self.method].score(candidates, self)
        best = scores.sort(dim=0, descending=True, stable=True).indices[: self.tokens]
        indices = best.sort(dim=0).values
        return indices, scores.gather(0, indices)


Score = Callable[[Candidates, Selector], "torch.Tensor"]


def r_kv(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """`λ I + (1 - λ) R`: what the answer attends to and no other token says. KaVa's form of R-KV."""
    import torch

    total = torch.zeros(candidates.keys.shape[:3], dtype=torch.float64)
    for share, score in ((selector.mix_lambda, attention_only), (1 - selector.mix_lambda, redundancy_only)):
        if share > 0:
            part = score(candidates, selector)
            total += share * (_standardised(part) if selector.mix == "zscore" else part)
    return total


def attention_only(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """`I`: the answer's attention, as captured."""
    assert candidates.importance is not None
    return candidates.importance.double()


def redundancy_only(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """`R`: softmax over tokens of the mean negative cosine with the others' keys; high is unlike the rest.

    `Σ_j cos(k_i, k_j)` is `k_i / |k_i| · Σ_j k_j / |k_j|`, so that no `[n, n]` matrix is needed.
    """
    import torch

    keys = candidates.keys.double()
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosines = (unit * (unit.sum(0, keepdim=True) - unit)).sum(-1)
    return torch.softmax(-cosines / max(len(keys), 1), dim=0)


def random(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """A number drawn for each token, layer and head: the control. The same for a sample wherever it lies."""
    import torch

    seed = int(digest_json([selector.seed, candidates.sample_id])[:15], 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(candidates.keys.shape[:3], dtype=torch.float64, generator=generator)


def uniform(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """One for the tokens `round(i (n - 1) / (M - 1))`, halves up: evenly spread, first and last among them."""
    import torch

    count, slots = len(candidates.keys), min(selector.tokens, len(candidates.keys))
    places = [count - 1] if slots == 1 else [(2 * i * (count - 1) + slots - 1) // (2 * slots - 2) for i in range(slots)]
    scores = torch.zeros(candidates.keys.shape[:3], dtype=torch.float64)
    scores[places] = 1
    return scores


def crop(candidates: Candidates, selector: Selector) -> torch.Tensor:
    """The token's own number: the last `M` are kept."""
    import torch

    numbers = torch.arange(len(candidates.keys), dtype=torch.float64)
    return numbers[:, None, None].expand(candidates.keys.shape[:3])


@dataclass(frozen=True)
class Method:
    """A method and what it must see."""

    score: Score
    """`[n, l, h]` float64."""
    needs_importance: bool = False
    compares_keys: bool = False


SELECTORS: Final[dict[str, Method]] = {
    "r-kv": Method(r_kv, needs_importance=True, compares_keys=True),
    "attention-only": Method(attention_only, needs_importance=True),
    "redundancy-only": Method(redundancy_only, compares_keys=True),
    "random": Method(random),
    "uniform": Method(uniform),
    "crop": Method(crop),
}


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    """Mean zero and variance one over tokens; all zero where the scores do not differ."""
    import torch

    centred = scores - scores.mean(0, keepdim=True)
    spread = centred.square().mean(0, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
