"""How many tokens a corpus has under a tokenizer: all of them counted, or some and how sure that makes."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

from ...extract import Corpus, Encoder

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class TokenCount:
    """Tokens of the samples that were counted, and what they stand for."""

    indices: list[int]
    lengths: list[int]
    text_bytes: list[int]
    """UTF-8 bytes of every sample of the corpus."""
    error: float
    """Half the width of a 95 % interval around the total, relative to it; 0 if all samples were counted."""

    @property
    def is_exact(self) -> bool:
        """Whether every sample was counted."""
        return len(self.indices) == len(self.text_bytes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that was counted."""
        return max(self.lengths, default=0)

    def rows(self, page_tokens: int = 1, among: Collection[int] | None = None) -> int:
        """Tokens, each sample's rounded up to whole pages.

        Args:
            page_tokens: tokens in a page.
            among: only these samples; estimated by their share of the text where not all were counted.
        """
        wanted = range(len(self.text_bytes)) if among is None else among
        if self.is_exact:
            chosen = set(wanted)
            pairs = zip(self.indices, self.lengths, strict=True)
            return sum(-(-length // page_tokens) * page_tokens for index, length in pairs if index in chosen)
        counted = sum(-(-length // page_tokens) * page_tokens for length in self.lengths)
        share = sum(self.text_bytes[i] for i in wanted) / sum(self.text_bytes[i] for i in self.indices)
        return round(counted * share)


def count_tokens(encoder: Encoder, corpus: Corpus, sample: int | None = None, seed: int = 0) -> TokenCount:
    """Encodes every sample, or a random choice of `sample` of them.

    The total of a choice is the ratio estimate (Cochran 1977, chapter 6): its tokens per byte, times all bytes.
    """
    sizes = [len(record.text.encode()) for record in corpus.records]
    if sample is None or sample >= len(corpus):
        chosen = list(range(len(corpus)))
    else:
        chosen = sorted(random.Random(seed).sample(range(len(corpus)), sample))
    lengths = [len(encoder.encode(corpus.records[i])) for i in chosen]
    if len(chosen) == len(corpus) or len(chosen) < 2:
        return TokenCount(chosen, lengths, sizes, 0.0 if len(chosen) == len(corpus) else 1.0)
    per_byte = sum(lengths) / sum(sizes[i] for i in chosen)
    residuals = [length - per_byte * sizes[i] for i, length in zip(chosen, lengths, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(chosen) - 1))
    finite = math.sqrt((1 - len(chosen) / len(corpus)) / len(chosen))
    return TokenCount(chosen, lengths, sizes, _NORMAL_95 * len(corpus) * finite * spread / (per_byte * sum(sizes)))


def at_most(corpus: Corpus, bytes_per_token: float) -> TokenCount:
    """An upper bound where there is no tokenizer: a token for so many bytes of text."""
    sizes = [len(record.text.encode()) for record in corpus.records]
    lengths = [math.ceil(size / bytes_per_token) for size in sizes]
    return TokenCount(list(range(len(corpus))), lengths, sizes, 0.0)
