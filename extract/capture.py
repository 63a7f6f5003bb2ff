"""The capture loop: corpus in, store out, part by part.

Inside a part, samples are batched by length under a token budget; the writer encodes and writes on its own thread while
the next batch is computed. Batches never cross a part, so a part's bits depend on nothing but the part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from ..errors import CorpusError
from ..store import BackgroundWriter, KVSample, KVStore
from .corpus import Corpus
from .teacher import Teacher
from .tokens import Encoder, Tokens


class CaptureSettings(BaseModel):
    """How to capture. Nothing here determines what is captured, so it may change between two runs of one store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_tokens: PositiveInt = 4096
    """Tokens in one forward pass, padding included."""
    too_long: Literal["error", "skip"] = "error"
    """What to do with a sample longer than the teacher's context: stop, or record it as failed."""


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest, stays within `batch_tokens`; a group has one at least.

    Sorted by length, longest first, so that padding is small and running out of memory happens at once or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def capture_store(
    store: KVStore,
    corpus: Corpus,
    encoder: Encoder,
    teacher: Teacher,
    settings: CaptureSettings,
    *,
    parts: Sequence[int] | None = None,
    on_text: Callable[[int], None] = lambda size: None,
) -> None:
    """Captures every part of `store` that is not written yet.

    Args:
        store: a store whose manifest describes this corpus and teacher.
        corpus: its records, in the store's order.
        encoder: the teacher's tokenizer.
        teacher: what computes keys and values.
        settings: batching and what to do with samples that are too long.
        parts: only these parts.
        on_text: called with the bytes of text of each finished batch.

    Raises:
        CorpusError: for a sample longer than the teacher's context, if `settings.too_long` is `error`.
    """
    wanted = [p for p in store.missing_parts() if parts is None or p in parts]
    with BackgroundWriter(store) as writer:
        for part in wanted:
            indices = store.manifest.part_samples(part)
            tokens = {position: encoder.encode(corpus.records[i]) for position, i in enumerate(indices)}
            writer.begin(part)
            for position in list(tokens):
                record, length = corpus.records[indices[position]], len(tokens[position])
                if length <= teacher.max_tokens and length > 0:
                    continue
                reason = f"{length} tokens, the model reads at most {teacher.max_tokens}" if length else "no tokens"
                if settings.too_long == "error":
                    raise CorpusError(
                        f"sample {record.sample_id!r}: {reason}; shorten it, or set extract.too_long: skip"
                    )
                writer.fail(position, record.sample_id, record.split, reason)
                del tokens[position]
            positions = list(tokens)
            for batch in plan_batches([len(tokens[p]) for p in positions], settings.batch_tokens):
                chosen = [positions[i] for i in batch]
                captured = teacher.capture([tokens[p] for p in chosen])
                for position, (keys, values) in zip(chosen, captured, strict=True):
                    record = corpus.records[indices[position]]
                    writer.append(position, _sample(record.sample_id, record.split, tokens[position], keys, values))
                on_text(sum(len(corpus.records[indices[p]].text.encode()) for p in chosen))
            writer.commit()


def _sample(sample_id: str, split: object, tokens: Tokens, keys: object, values: object) -> KVSample:
    return KVSample(
        sample_id=sample_id,
        split=split,  # type: ignore[arg-type]
        keys=keys,  # type: ignore[arg-type]
        values=values,  # type: ignore[arg-type]
        input_ids=tokens.input_ids,
        positions=tokens.positions,
        spans=tokens.spans,
        segments=tokens.segments,
        mask=np.ones(len(tokens), np.bool_),
    )
