"""Fused targets as they are read: a view of several teachers' target stores that trains like a store of its own.

It reads a sample of every teacher, fuses it, and rounds to the dtype of a store: `kava fuse` writes what it yields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import SampleFailedError, StageError
from ...store import KVGeometry, KVSample, KVStore, Split
from ...store.dtypes import dtype_of
from ..maps.moments import NAMES
from ..parallel import run_parts
from .fusion import Fusion, Survey, fusion_key, read_teachers, told
from .rules import Array

if TYPE_CHECKING:
    import torch


class FusedTargets(Sequence[KVSample]):
    """Targets fused while they are read; for a reader, a target store."""

    def __init__(self, path: Path, stores: Mapping[str, KVStore], fusion: Fusion) -> None:
        """A view.

        Args:
            path: of the file that `fusion` is from, for messages.
            stores: each teacher's targets.
            fusion: how to fuse them.

        Raises:
            StageError: if it is of other teachers or other targets.
        """
        self.path, self.fusion, self.manifest = path, fusion, fusion.manifest
        found = {name: store.manifest.fingerprint for name, store in stores.items()}
        if found != self.manifest.parents:
            differing = sorted(n for n in found | self.manifest.parents if found.get(n) != self.manifest.parents.get(n))
            raise StageError(f"{path} was made for other targets of {', '.join(differing)}; kava fuse")
        self.stores = {name: stores[name] for name in fusion.blend.teachers}
        self._dtype = dtype_of(self.manifest.dtype)

    @classmethod
    def open(cls, path: Path, stores: Mapping[str, Path]) -> FusedTargets:
        """The view that a file describes.

        Args:
            path: of the `Fusion`.
            stores: where each teacher's targets are.

        Raises:
            StoreNotFoundError: if one is not there.
            StageError: if it was measured on other targets.
        """
        return cls(path, {name: KVStore.open(place) for name, place in stores.items()}, Fusion.load(path))

    def check(self) -> None:
        """Checks that what was measured holds for the targets that are there.

        Raises:
            StageError: if some are missing, or were made again since.
        """
        for store in self.stores.values():
            store.check_files()
        if self.fusion.key != fusion_key(self.stores, self.manifest):
            raise StageError(f"{self.path}: targets were made again since; kava fuse")

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> KVSample:  # type: ignore[override]
        return self.sample(index)

    def __iter__(self) -> Iterator[KVSample]:
        return (self.sample(i) for i in range(len(self)))

    @property
    def content(self) -> str:
        """A digest of the targets that are fused, and of how."""
        return self.fusion.key

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width."""
        return self.manifest.geometry

    def sample(self, index: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """Sample `index`, with `weights` `[k]` as its only extra; keys and values are read only if asked for.

        Raises:
            IndexError: if there is no such sample.
            SampleFailedError: if it failed in every teacher.
            AlignmentError: if the teachers' targets are on different tokens.
        """
        number, position = self.manifest.place(index)
        index = self.manifest.part_samples(number)[position]
        weights = self.weights(number)[position]
        if not weights.any() or index in self._overflowed:
            raise SampleFailedError(self._reason(number, position))
        found = read_teachers(self.stores, index, keys=keys, values=values)
        first = next(sample for sample in found if sample is not None)
        masks = np.stack([np.zeros(len(first), np.bool_) if s is None else s.mask for s in found])
        fused: dict[str, torch.Tensor | None] = dict.fromkeys(NAMES)
        for name, wanted in zip(NAMES, (keys, values), strict=True):
            if wanted:
                tensors = [None if s is None else getattr(s, name) for s in found]
                fused[name] = self.fusion.blend(name, tensors, weights, masks).to(self._dtype.torch_dtype)
        return replace(
            first,
            keys=fused["keys"],
            values=fused["values"],
            mask=np.asarray(masks.any(0)),
            extras={"weights": weights},
        )

    @property
    def lengths(self) -> Array:
        """As `KVStore.lengths`; of a sample that failed in some teachers, what the others have."""
        found: Array = np.max([store.lengths for store in self.stores.values()], axis=0)
        return found

    def weights(self, number: int) -> Array:
        """`[samples, k]`: how much each teacher counts in each sample of a part; zeros where all failed."""
        return self.fusion.weighting(*told(self.stores, self.fusion.weighting, number))

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not written yet for every teacher."""
        return sorted({number for store in self.stores.values() for number in store.missing_parts()})

    def indices(self, split: Split | None = None) -> list[int]:
        """Samples that did not fail in every teacher, of one split or of all, in parts that are written."""
        missing = {*self.missing_parts()}
        return [
            self.manifest.part_samples(number)[position]
            for number in range(self.manifest.num_parts)
            if number not in missing
            for position in self._good(number)
            if split is None or self._first.part(number).splits[position] == int(split)
        ]

    @property
    def failed(self) -> dict[str, str]:
        """Ids of the samples that failed in every teacher, with the reasons."""
        missing = {*self.missing_parts()}
        return {
            self._first.part(number).sample_id(position): self._reason(number, position)
            for number in range(self.manifest.num_parts)
            if number not in missing
            for position in sorted({*range(len(self.manifest.part_samples(number)))} - {*self._good(number)})
        }

    @cached_property
    def survey(self) -> Survey:
        """A pass over all targets, unless the file has its result."""
        return self.fusion.survey or take_survey(self)

    def statistics(self) -> dict[str, Array]:
        """As `KVStore.statistics`: per layer, over all tokens with a target, `[l]` each."""
        count = max(self.survey.tokens * self.geometry.width, 1)
        out: dict[str, Array] = {}
        for name in NAMES:
            mean, squares = self.survey.sums[name] / count
            out |= {f"{name}_mean": mean, f"{name}_std": np.sqrt(np.maximum(squares - mean**2, 0))}
        return out

    @property
    def _first(self) -> KVStore:
        return next(iter(self.stores.values()))

    @property
    def _overflowed(self) -> Mapping[int, str]:
        return {} if self.fusion.survey is None else self.fusion.survey.overflowed

    def _good(self, number: int) -> list[int]:
        kept = np.flatnonzero(self.weights(number).any(1)).tolist()
        samples = self.manifest.part_samples(number)
        return [position for position in kept if samples[position] not in self._overflowed]

    def _reason(self, number: int, position: int) -> str:
        index = self.manifest.part_samples(number)[position]
        if index in self._overflowed:
            return self._overflowed[index]
        return "; ".join(f"{name}: {store.part(number).failed[position]}" for name, store in self.stores.items())


def take_survey(view: FusedTargets, on_part: Callable[[int], None] = lambda part: None) -> Survey:
    """Reads all targets once, on threads; the sums are those of the parts of a store, in the same order."""
    import torch

    found: dict[int, tuple[int, dict[str, Array], dict[int, str]]] = {}
    layers = view.geometry.num_layers

    def survey(number: int) -> int:
        own = FusedTargets(view.path, {n: KVStore(s.path, s.manifest) for n, s in view.stores.items()}, view.fusion)
        tokens, overflowed = 0, {}
        sums = {name: np.zeros((2, layers)) for name in NAMES}
        for position in np.flatnonzero(own.weights(number).any(1)).tolist():
            index = own.manifest.part_samples(number)[position]
            sample = own.sample(index)
            kept = torch.from_numpy(sample.mask)
            rows = {}
            for name in NAMES:
                flat = getattr(sample, name)[kept].double().flatten(2)
                rows[name] = torch.stack([flat.sum((0, 2)), flat.square().sum((0, 2))]).numpy()
                if bad := np.flatnonzero(~np.isfinite(rows[name]).all(0)).tolist():
                    overflowed[index] = f"non-finite {name} in layers {bad}"
                    break
            else:
                tokens += int(sample.mask.sum())
                for name in NAMES:
                    sums[name] += rows[name]
        found[number] = tokens, sums, overflowed
        return number

    run_parts(survey, range(view.manifest.num_parts), scheduler=None, on_part=on_part)
    parts = [found[number] for number in range(view.manifest.num_parts)]
    total = {name: np.sum([p[1][name] for p in parts], axis=0) if parts else np.zeros((2, layers)) for name in NAMES}
    return Survey(sum(p[0] for p in parts), total, {i: why for p in parts for i, why in p[2].items()})
