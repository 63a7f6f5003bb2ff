"""How a corpus is cut into parts, and which samples are the calibration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

PART_BYTES: Final = 9 << 28
"""Raw bytes of keys and values in one part, at most, as far as the text's length tells; some twenty files per GB."""
MIN_PARTS: Final = 8
"""A small corpus is still cut into this many parts, so that it can be shared out and resumed."""
MAX_PART_SAMPLES: Final = 1 << 14
"""Samples in one part at most: what a part keeps in memory of each of them while it is written stays small."""
CALIBRATION_PARTS: Final = 8
"""The calibration is drawn from this many parts, or more where these hold too few samples."""
BYTES_PER_TOKEN: Final = 2.5
"""UTF-8 bytes of text per token, on the low side of today's tokenizers, for cutting the corpus into parts."""


def samples_per_part(sizes: Sequence[float]) -> int:
    """Return the largest number of samples per part within `PART_BYTES`, `MIN_PARTS` and `MAX_PART_SAMPLES`."""
    low, high = 1, min(MAX_PART_SAMPLES, max(1, -(-len(sizes) // MIN_PARTS)))
    while low < high:
        middle = (low + high + 1) // 2
        parts = range(0, len(sizes), middle)
        if all(sum(sizes[first : first + middle]) <= PART_BYTES for first in parts):
            low = middle
        else:
            high = middle - 1
    return low


def draw_calibration(
    train: Sequence[int], num_samples: int, size: int, count: int, seed: int
) -> tuple[list[int], list[int]]:
    """Parts and samples that maps are fitted on: a seeded choice of training samples from whole parts.

    Args:
        train: indices of the training samples.
        num_samples: of the whole corpus.
        size: samples in a part.
        count: samples to choose, or all there are.
        seed: of the choice.

    Returns:
        `CALIBRATION_PARTS` parts, or more where these hold too few; and the samples, both ascending.
    """
    draw, order = random.Random(seed), list(range(-(-num_samples // size)))
    draw.shuffle(order)
    chosen: list[int] = []
    pool: list[int] = []
    for part in order:
        if len(chosen) >= CALIBRATION_PARTS and len(pool) >= count:
            break
        chosen.append(part)
        pool += [index for index in train if index // size == part]
    return sorted(chosen), sorted(draw.sample(pool, min(len(pool), count)))
