"""The capture loop: corpus in, store out, part by part.

A teacher gets the samples of one part at a time, and batches them as it likes; the writer encodes and writes on its own
thread while the next batch is computed. Batches never cross a part, so a part's bits depend on nothing but the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from ..errors import CorpusError, StoreError, StoreNotFoundError
from ..store import BackgroundWriter, Derive, KVSample, KVStore, Lock, claimed
from .corpus import Corpus, Record
from .teacher import Captured, Teacher
from .tokens import Encoder, Tokens

REMEDY: Final = "shorten it, or set extract.too_long: skip"
_COUNTED: Final = 512
"""Records that are tokenised at a time to count their tokens."""
_MOST_TOKENS: Final = 18
"""Tokens of one byte of text at most: characters that Unicode normalisation (NFKC) makes of one."""


class CaptureSettings(BaseModel):
    """How to capture. Nothing here changes the fingerprint, so it may change between two runs of one store.

    What `batch_tokens` changes is rounding: each part states it, with the backend and the device, as `written_by`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_tokens: PositiveInt = 4096
    """Tokens in one forward pass; under Hugging Face padding included. Another number rounds otherwise."""
    too_long: Literal["error", "skip"] = "error"
    """What to do with a sample longer than the teacher's context: stop, or record it as failed."""
    mix_backends: bool = False
    """Let a store that one backend began be continued by another."""


def capture_store(
    store: KVStore,
    corpus: Corpus,
    encoder: Encoder,
    teacher: Teacher,
    settings: CaptureSettings,
    *,
    parts: Sequence[int] | None = None,
    derive: Derive | None = None,
    sources: dict[str, str] | None = None,
    on_text: Callable[[int], None] = lambda size: None,
    limit: str = "",
) -> None:
    """Captures every part of `store` that is not written yet, and that no other process is capturing.

    Args:
        store: a store whose manifest describes this corpus and teacher.
        corpus: its records, in the store's order.
        encoder: the teacher's tokenizer.
        teacher: what computes keys and values.
        settings: what to do with samples that are too long, and with parts that another backend made.
        parts: only these parts.
        derive: makes each sample of `store` of a captured one; then `store` need not hold the teacher's geometry.
        sources: what each part records that it was made from.
        on_text: called with the bytes of text of each finished sample.
        limit: name of what limits the length of a sample, for messages.

    Raises:
        CorpusError: for a sample longer than the teacher's context, if `settings.too_long` is `error`.
        StoreError: if another backend made parts of the store, unless `settings.mix_backends`.
    """
    if not settings.mix_backends:
        _refuse_other_backends(store, teacher.backend)
    wanted = [p for p in store.missing_parts() if parts is None or p in parts]
    claims: dict[int, Lock] = {}
    with (
        _released(claims),
        BackgroundWriter(store, derive=derive, on_commit=lambda part: claims.pop(part).release()) as writer,
    ):
        for part, claim in claimed(wanted, partial(_claim, store)):
            claims[part] = claim
            indices = store.manifest.part_samples(part)
            if store.holds(part) or not store.path.is_dir():  # Another process made it meanwhile.
                claims.pop(part).release()
                on_text(sum(corpus.text_bytes[i] for i in indices))
                continue
            tokens = {position: encoder.encode(corpus.records[i]) for position, i in enumerate(indices)}
            writer.begin(part)
            for position in list(tokens):
                record, length = corpus.records[indices[position]], len(tokens[position])
                if length <= teacher.max_tokens and length > 0:
                    continue
                reason = too_long(length, teacher.max_tokens, limit)
                if settings.too_long == "error":
                    raise CorpusError(f"sample {record.sample_id!r}: {reason}; {REMEDY}")
                writer.fail(position, record.sample_id, record.split, reason)
                del tokens[position]
            positions = list(tokens)
            for captured in teacher.capture([tokens[p] for p in positions]):
                position = positions[captured.index]
                record = corpus.records[indices[position]]
                if np.isnan(captured.extras.get("logprobs", 0)).any():
                    writer.fail(position, record.sample_id, record.split, "non-finite logits")
                else:
                    writer.append(position, _sample(record, tokens[position], captured))
                on_text(record.num_bytes)
            writer.commit(sources, written_by=teacher.backend)


def refuse_long_samples(
    corpus: Corpus,
    indices: Sequence[int],
    encoder: Encoder,
    max_tokens: int,
    limit: str,
    *,
    on_sample: Callable[[int], None] = lambda count: None,
) -> None:
    """Refuse samples that a teacher cannot read, before the first of them is captured.

    Args:
        corpus: the records.
        indices: of the samples that are to be captured.
        encoder: the teacher's tokenizer.
        max_tokens: tokens that the teacher reads at most.
        limit: name of what limits them, for messages.
        on_sample: called after each batch with its number of samples.

    Raises:
        CorpusError: naming the first sample, and how many there are.
    """
    first, count, sizes = "", 0, corpus.text_bytes
    for start in range(0, len(indices), _COUNTED):
        batch = indices[start : start + _COUNTED]
        # Without a template a short text needs no count; an empty one may have no token.
        unknown = [i for i in batch if encoder.chat_template or not 0 < _MOST_TOKENS * sizes[i] + 64 < max_tokens]
        records = [corpus.records[i] for i in unknown]
        for record, length in zip(records, encoder.count(records), strict=True):
            if not 0 < length <= max_tokens:
                first = first or f"sample {record.sample_id!r}: {too_long(length, max_tokens, limit)}"
                count += 1
        on_sample(len(batch))
    if count:
        several = f" ({count:,} of {len(indices):,} samples cannot be read)" if count > 1 else ""
        raise CorpusError(f"{first}{several}; {REMEDY}")


def too_long(length: int, max_tokens: int, limit: str) -> str:
    """Return why a sample of this length cannot be read."""
    name = f" ({limit})" if limit else ""
    return f"{length} tokens, the model reads at most {max_tokens}{name}" if length else "no tokens"


def _claim(store: KVStore, part: int, wait: bool) -> Lock | None:
    """The claim on a part; one that nobody holds if the store is complete and took the place of an older one."""
    try:
        return store.claim(part, wait=wait)
    except StoreNotFoundError:
        return Lock(store.path, None)


@contextmanager
def _released(claims: dict[int, Lock]) -> Iterator[None]:
    try:
        yield
    finally:
        for claim in claims.values():
            claim.release()


def _refuse_other_backends(store: KVStore, backend: str) -> None:
    name = backend.split()[0]
    for number in store.committed_parts():
        other = store.part(number).written_by
        if other and other.split()[0] != name:
            raise StoreError(
                f"{store.path}: part {number} was captured by {other}, this is {backend}; numbers differ by rounding. "
                "Set extract.mix_backends: true if that is meant, or write elsewhere (run_dir)"
            )


def _sample(record: Record, tokens: Tokens, captured: Captured) -> KVSample:
    return KVSample(
        sample_id=record.sample_id,
        split=record.split,
        keys=captured.keys,
        values=captured.values,
        input_ids=tokens.input_ids,
        positions=tokens.positions,
        spans=tokens.spans,
        segments=tokens.segments,
        mask=np.ones(len(tokens), np.bool_),
        extras=captured.extras,
    )
