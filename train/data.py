"""Samples of a target store as training batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..store import LOGITS, SEGMENTS, KVGeometry, KVSample, Manifest, Split, collate

IGNORED: Final = -100
"""Label of tokens that are not predicted."""


class Targets(Protocol):
    """What training reads: a target store, or something that reads like one."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def manifest(self) -> Manifest:
        """What the targets are of."""

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width."""

    def sample(self, index: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """Sample `index`; keys, values and extra arrays are read only if asked for."""

    def indices(self, split: Split | None = None) -> list[int]:
        """Samples that did not fail, of one split or of all."""

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not there yet."""

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Per layer `[l]`, over all tokens with a target: `keys_mean`, `keys_std`, `values_mean`, `values_std`."""


class TargetDataset(Dataset[KVSample]):
    """The written samples of one split; keys and values are read only where there is a KV loss, logits likewise."""

    def __init__(self, store: Targets, split: Split, *, with_kv: bool, with_logits: bool = False) -> None:
        self.store, self.with_kv, self.with_logits = store, with_kv, with_logits
        self.indices = store.indices(split)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> KVSample:
        return self.store.sample(self.indices[item], keys=self.with_kv, values=self.with_kv, extras=self.with_logits)


@dataclass(frozen=True)
class TargetCollator:
    """Pads samples on the right and makes labels."""

    pad_token_id: int
    ce_segments: tuple[str, ...]
    """Segments whose tokens are predicted."""

    def __call__(self, samples: Sequence[KVSample]) -> dict[str, Any]:
        """A batch.

        `input_ids`, `attention_mask`, `labels`, `segments`, `kv_mask` `[b, t]`; `sample_ids`, a list of `b`; with a KV
        loss also `keys`, `values` `[b, t, l, h, d]`; with logits `logit_ids`, `logprobs` `[b, t, k]` and `logprob_tail`
        `[b, t]`, where padding has id -1.
        """
        batch = collate(samples, pad_token_id=self.pad_token_id)
        wanted = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for name in self.ce_segments:
            wanted |= batch.segments == int(SEGMENTS[name])
        for row, sample in enumerate(samples):
            # The end of the sequence is no text, but must be learned.
            if len(sample) and sample.segments[-1] == int(SEGMENTS["none"]):
                wanted[row, len(sample) - 1] = True
        out: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": torch.where(wanted, batch.input_ids, IGNORED),
            "segments": batch.segments,
            "kv_mask": batch.mask,
            "sample_ids": batch.sample_ids,
        }
        if batch.keys is not None:
            out |= {"keys": batch.keys, "values": batch.values}
        if LOGITS[0] in samples[0].extras:
            out |= {name: _padded([sample.extras[name] for sample in samples]) for name in LOGITS}
        return out


def _padded(rows: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    """Arrays `[t, ...]` as one tensor `[b, t, ...]`, filled with -1."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(np.ascontiguousarray(array)) for array in rows], batch_first=True, padding_value=-1
    )
