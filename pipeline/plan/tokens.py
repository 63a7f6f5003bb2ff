"""How many tokens a corpus has under a tokenizer: all of them counted, or some and how sure that makes."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...extract import Corpus, Encoder
from ...store import SEGMENTS

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class TokenCount:
    """Tokens of the samples that were counted, and what they stand for."""

    indices: Sequence[int]
    lengths: Sequence[int]
    text_bytes: Sequence[int]
    """UTF-8 bytes of every sample of the corpus."""
    error: float
    """Half the width of a 95 % interval around the total, relative to it; 0 if all samples were counted."""
    counted_segments: dict[str, int] = field(default_factory=dict)
    """Tokens of each segment in the samples that were counted; empty if there is no tokenizer."""

    @property
    def is_exact(self) -> bool:
        """Whether every sample was counted."""
        return len(self.indices) == len(self.text_bytes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that was counted."""
        return max(self.lengths, default=0)

    @property
    def segments(self) -> dict[str, int]:
        """Tokens of each segment in all samples, estimated by their share of the tokens that were counted."""
        scale = self.rows() / max(sum(self.lengths), 1)
        return {name: round(count * scale) for name, count in self.counted_segments.items()}

    def rows(self, page_tokens: int = 1, among: Collection[int] | None = None) -> int:
        """Tokens, each sample's rounded up to whole pages.

        Args:
            page_tokens: tokens in a page.
            among: only these samples; estimated by their share of the text where not all were counted.
        """
        wanted = range(len(self.text_bytes)) if among is None else among
        if self.is_exact:
            chosen = wanted if among is None else set(among)
            pairs = zip(self.indices, self.lengths, strict=True)
            return sum(-(-length // page_tokens) * page_tokens for index, length in pairs if index in chosen)
        counted = sum(-(-length // page_tokens) * page_tokens for length in self.lengths)
        share = sum(self.text_bytes[i] for i in wanted) / sum(self.text_bytes[i] for i in self.indices)
        return round(counted * share)


def count_tokens(encoder: Encoder, corpus: Corpus, sample: int | None = None, seed: int = 0) -> TokenCount:
    """Encodes every sample, or a random choice of `sample` of them.

    The total of a choice is the ratio estimate (Cochran 1977, chapter 6): its tokens per byte, times all bytes.
    """
    sizes = corpus.text_bytes
    chosen: Sequence[int]
    if sample is None or sample >= len(corpus):
        chosen = range(len(corpus))
    else:
        chosen = sorted(random.Random(seed).sample(range(len(corpus)), sample))
    lengths, kinds = array("q"), np.zeros(256, np.int64)
    for index in chosen:
        tokens = encoder.encode(corpus.records[index])
        lengths.append(len(tokens))
        kinds += np.bincount(tokens.segments, minlength=256)
    segments = {name: int(kinds[segment]) for name, segment in SEGMENTS.items() if segment}
    if len(chosen) == len(corpus) or len(chosen) < 2:
        return TokenCount(chosen, lengths, sizes, 0.0 if len(chosen) == len(corpus) else 1.0, segments)
    per_byte = sum(lengths) / sum(sizes[i] for i in chosen)
    residuals = [length - per_byte * sizes[i] for i, length in zip(chosen, lengths, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(chosen) - 1))
    finite = math.sqrt((1 - len(chosen) / len(corpus)) / len(chosen))
    error = _NORMAL_95 * len(corpus) * finite * spread / (per_byte * sum(sizes))
    return TokenCount(chosen, lengths, sizes, error, segments)


def at_most(corpus: Corpus, bytes_per_token: float) -> TokenCount:
    """An upper bound where there is no tokenizer: a token for so many bytes of text."""
    sizes = corpus.text_bytes
    lengths = array("q", (math.ceil(size / bytes_per_token) for size in sizes))
    return TokenCount(range(len(corpus)), lengths, sizes, 0.0)
