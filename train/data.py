"""Samples of a target store as training batches.

A batch has rows, and a row one sample or, packed, several behind each other. Axes: `b` rows, `t` tokens, `l` layers
with a KV loss, `h` KV heads, `d` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import KavaError
from ..store import LOGITS, SEGMENTS, KVGeometry, KVSample, KVStore, Manifest, Segment, Split
from ..store.dtypes import dtype_of

S = TypeVar("S")

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

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of every sample `[num_samples]`; 0 where there is none."""

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not there yet."""

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Per layer `[l]`, over all tokens with a target: `keys_mean`, `keys_std`, `values_mean`, `values_std`."""


class TargetDataset(Dataset[KVSample]):
    """The written samples of one split, with what the loss looks at of their keys and values."""

    def __init__(
        self,
        store: Targets,
        split: Split,
        *,
        names: Sequence[str] = ("keys", "values"),
        layers: Sequence[int] | None = None,
        logits: bool = False,
    ) -> None:
        """The samples.

        Args:
            store: the targets.
            split: of the samples.
            names: what is read, of `keys` and `values`.
            layers: of which layers, in this order; None for all.
            logits: whether the teacher's logits are read, with the other extra arrays.
        """
        self.store, self.names, self.logits = store, tuple(names), logits
        self.layers = tuple(range(store.geometry.num_layers)) if layers is None else tuple(layers)
        self.indices = np.asarray(store.indices(split), np.int64)
        """Index in the store of each sample `[n]`; arrays, because a corpus may have millions of them."""
        self.lengths = store.lengths[self.indices]
        """Tokens of each sample `[n]`."""
        self.parts = self.indices // store.manifest.samples_per_part
        """The part that each sample is in `[n]`."""
        geometry = store.geometry
        self.shape = (len(self.layers), geometry.num_key_value_heads, geometry.head_dim)
        """Of a token's keys or values, `(l, h, d)`."""
        self.dtype = dtype_of(store.manifest.dtype).torch_dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> KVSample:
        shape = (int(self.lengths[item]), *self.shape)
        tensors = {name: torch.empty(shape, dtype=self.dtype) for name in self.names}
        found = self.read(item, tensors)
        return replace(found, keys=tensors.get("keys"), values=tensors.get("values"))

    def read(self, item: int, into: Mapping[str, torch.Tensor]) -> KVSample:
        """Sample `item` without keys and values, which are written to `into` instead.

        Args:
            item: its number in this dataset.
            into: `keys` and `values`, those of `names`: `[tokens, l, h, d]` of the store's dtype.

        Raises:
            KavaError: if it cannot be read, with its number in the store.
        """
        index = int(self.indices[item])
        # All layers in order is a plain copy; a list of them is picked out one by one.
        layers = None if self.layers == tuple(range(self.store.geometry.num_layers)) else list(self.layers)
        try:
            if isinstance(self.store, KVStore):
                found = self.store.sample(index, keys=False, values=False, extras=self.logits)
                if into:
                    to_numpy = self.store.dtype.to_numpy
                    arrays = {name: to_numpy(tensor) for name, tensor in into.items()}
                    self.store.read_into(index, **arrays, layers=layers)
                return found
            found = self.store.sample(index, keys="keys" in into, values="values" in into, extras=self.logits)
        except KavaError as error:
            raise type(error)(f"sample {index}: {error}") from error
        for name, tensor in into.items():
            source = getattr(found, name)
            tensor.copy_(source if layers is None else source[:, layers])
        return replace(found, keys=None, values=None)


@dataclass(frozen=True)
class TargetCollator:
    """Puts samples into the rows of a batch, padded on the right, and makes labels."""

    pad_token_id: int
    ce_segments: tuple[str, ...]
    """Segments whose tokens are predicted."""

    def __call__(self, samples: Sequence[KVSample]) -> dict[str, Any]:
        """A batch with a row for each sample: see `collate`."""
        tokens = max(map(len, samples))
        tensors = {}
        for name in ("keys", "values"):
            found = [getattr(sample, name) for sample in samples]
            if found[0] is not None:
                tensors[name] = torch.zeros((len(found), tokens, *found[0].shape[1:]), dtype=found[0].dtype)
                for row, tensor in zip(tensors[name], found, strict=True):
                    row[: len(tensor)] = tensor
        return self.collate([[sample] for sample in samples], tensors)

    def collate(self, rows: Sequence[Sequence[KVSample]], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A batch.

        Args:
            rows: the samples of each row.
            tensors: `keys` and `values` `[b, t, l, h, d]`, those that are needed, as they are to be in the batch.

        Returns:
            `input_ids`, `labels`, `segments`, `kv_mask` `[b, t]`; `sample_ids`, `num_tokens` and `text_bytes` of all;
            `keys` and `values`, if given; where samples have logits, `logit_ids`, `logprobs` `[b, t, k]` and
            `logprob_tail` `[b, t]`, with id -1 for padding. With one sample a row `attention_mask` `[b, t]`; otherwise
            `position_ids` `[b, t]`, which begin again with every sample, as padding does, and `sample_numbers`
            `[b, t]`, -1 for padding: models and losses tell samples apart by these.
        """
        size = (len(rows), max(sum(map(len, row)) for row in rows))
        ids, labels = np.full(size, self.pad_token_id, np.int64), np.full(size, IGNORED, np.int64)
        segments, mask = np.zeros(size, np.uint8), np.zeros(size, np.bool_)
        positions, numbers = np.zeros(size, np.int64), np.full(size, -1, np.int64)
        for row, start, number, sample in places(rows, len):
            here = (row, slice(start, start + len(sample)))
            ids[here], segments[here], mask[here] = sample.input_ids, sample.segments, sample.mask
            labels[here] = np.where(self._predicted(sample), sample.input_ids, IGNORED)
            # Nothing of its own sample is before it to predict it from.
            labels[row, start] = IGNORED
            positions[here], numbers[here] = np.arange(len(sample)), number
        out: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "segments": torch.from_numpy(segments),
            "kv_mask": torch.from_numpy(mask),
            "sample_ids": [sample.sample_id for row in rows for sample in row],
            "num_tokens": int((numbers >= 0).sum()),
            "text_bytes": sum(sample.text_bytes for row in rows for sample in row),
            **tensors,
        }
        first = rows[0][0].extras
        for name in LOGITS if LOGITS[0] in first else ():
            array = np.full((*size, *first[name].shape[1:]), -1, first[name].dtype)
            for row, start, _, sample in places(rows, len):
                array[row, start : start + len(sample)] = sample.extras[name]
            out[name] = torch.from_numpy(array)
        if all(len(row) == 1 for row in rows):
            return out | {"attention_mask": torch.from_numpy((numbers >= 0).astype(np.int64))}
        for row, samples in enumerate(rows):
            end = sum(map(len, samples))
            positions[row, end:] = np.arange(size[1] - end)
        return out | {"position_ids": torch.from_numpy(positions), "sample_numbers": torch.from_numpy(numbers)}

    def _predicted(self, sample: KVSample) -> np.ndarray[Any, Any]:
        """`[t]`: which tokens are predicted."""
        chosen = [int(SEGMENTS[name]) for name in self.ce_segments]
        predicted = np.isin(sample.segments, [*chosen, int(Segment.TURN)])
        # Without a chat template the end of the sequence is the last token, directly after the text. Behind the end of
        # a template's turn there may be a line break, which a model that has ended its turn never writes.
        none = int(Segment.NONE)
        if len(sample) and sample.segments[-1] == none and (len(sample) == 1 or sample.segments[-2] != none):
            predicted[-1] = not (sample.segments == int(Segment.TURN)).any()
        return predicted


def places(rows: Sequence[Sequence[S]], tokens: Callable[[S], int]) -> Iterable[tuple[int, int, int, S]]:
    """Row, first token there, and number of every sample of a batch.

    Args:
        rows: the samples of each row, or what stands for them.
        tokens: how many each has.
    """
    number = 0
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            yield row, start, number, sample
            start, number = start + tokens(sample), number + 1
