"""Control targets: what is left of a gain when the targets say nothing of the text.

A control reads like the target store that it is made of: the same samples, tokens, masks and statistics, so that
batches and the scale of the loss are the same; only the training samples' keys and values are others. (A sample that is
dealt one without any target has none either.) Held-out samples keep theirs: a held-out KV error means the same whatever
a student was trained on.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from ..store import KVGeometry, KVSample, Manifest, Split

if TYPE_CHECKING:
    from pathlib import Path

    from .data import Targets


class ControlTargets(ABC):
    """Targets that are not those of the text."""

    def __init__(self, targets: Targets, seed: int = 0) -> None:
        """A control.

        Args:
            targets: the true ones.
            seed: of what is drawn.
        """
        self.targets, self.seed = targets, seed

    @abstractmethod
    def replaced(self, index: int, own: KVSample, *, keys: bool, values: bool) -> KVSample:
        """Training sample `index` with other keys and values, where they are asked for.

        Args:
            index: of the sample in the store.
            own: the sample, without keys and values.
            keys: whether keys are wanted.
            values: whether values are.
        """

    def sample(self, index: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """Sample `index`; keys, values and extra arrays, which stay its own, are read only if asked for."""
        own = self.targets.sample(index, keys=False, values=False, extras=extras)
        if own.split is not Split.TRAIN:
            return self.targets.sample(index, keys=keys, values=values, extras=extras)
        return self.replaced(index, own, keys=keys, values=values) if keys or values else own

    @property
    def path(self) -> Path:
        """Of the true targets."""
        return self.targets.path

    @property
    def manifest(self) -> Manifest:
        """Of the true targets."""
        return self.targets.manifest

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width."""
        return self.targets.geometry

    def indices(self, split: Split | None = None) -> list[int]:
        """Samples that did not fail, of one split or of all."""
        return self.targets.indices(split)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of every sample."""
        return self.targets.lengths

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return self.targets.missing_parts()

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Of the true targets."""
        return self.targets.statistics()


class ShuffledTargets(ControlTargets):
    """Each training sample has the targets of another one, always the same.

    The samples are dealt onto one seeded circle and each takes those of the next. Of the tokens that have a target, the
    i-th gets the i-th of the other sample's; where that is shorter, it begins again.
    """

    @cached_property
    def partner(self) -> dict[int, int]:
        """For each training sample, whose targets it gets; with a single one, its own."""
        train = np.asarray(self.targets.indices(Split.TRAIN))
        order = np.random.default_rng(self.seed).permutation(train)
        return dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))

    def replaced(self, index: int, own: KVSample, *, keys: bool, values: bool) -> KVSample:
        """Another sample's keys and values, laid over this one's tokens."""
        other = self.targets.sample(self.partner[index], keys=keys, values=values, extras=False)
        return take_rows(own, other, np.flatnonzero(other.mask))


class TokenShuffledTargets(ControlTargets):
    """Each training sample has its own targets, given to other tokens of it.

    The tokens with a target are dealt onto a seeded circle and each gets that of the next: none keeps its own, unless
    it is the only one.
    """

    def replaced(self, index: int, own: KVSample, *, keys: bool, values: bool) -> KVSample:
        """The sample's own keys and values in another order."""
        rows = np.flatnonzero(own.mask)
        circle = np.random.default_rng((self.seed, index)).permutation(len(rows))
        order = np.empty_like(rows)
        order[circle] = rows[np.roll(circle, -1)]
        return take_rows(own, self.targets.sample(index, keys=keys, values=values, extras=False), order)


class RandomTargets(ControlTargets):
    """Independent Gaussian numbers, with the mean and standard deviation of each layer's true targets.

    A sample's numbers are drawn from its id: they are the same in every epoch.
    """

    def replaced(self, index: int, own: KVSample, *, keys: bool, values: bool) -> KVSample:
        """Drawn numbers, in the dtype of a float32 store."""
        number = int.from_bytes(hashlib.sha256(own.sample_id.encode()).digest()[:8], "big")
        rng = np.random.default_rng((self.seed, number))
        # Both are drawn whatever is asked for: keys are the same with and without values.
        drawn = {name: rng.standard_normal((len(own), *self.geometry.shape)) for name in ("keys", "values")}
        made: dict[str, torch.Tensor] = {}
        for name, numbers in drawn.items():
            mean, std = (self._moments[f"{name}_{of}"][:, None, None] for of in ("mean", "std"))
            made[name] = torch.from_numpy((numbers * std + mean).astype(np.float32))
        return replace(own, keys=made["keys"] if keys else None, values=made["values"] if values else None)

    @cached_property
    def _moments(self) -> dict[str, np.ndarray[Any, Any]]:
        return self.targets.statistics()


def take_rows(own: KVSample, other: KVSample, rows: np.ndarray[Any, Any]) -> KVSample:
    """A sample whose tokens with a target have other rows' keys and values, in order, from the start again if too few.

    Args:
        own: the sample whose tokens stay.
        other: has `keys` and `values` `[t', l, h, d]`, or None where they were not read.
        rows: `[n]`: rows of `other`; with none, no token of the result has a target.
    """
    if not len(rows):
        return replace(own, keys=_like(own, other.keys), values=_like(own, other.values), mask=np.zeros_like(own.mask))
    mine = torch.from_numpy(np.flatnonzero(own.mask))
    taken = torch.from_numpy(np.resize(rows, len(mine)))
    keys, values = _like(own, other.keys), _like(own, other.values)
    for made, tensor in ((keys, other.keys), (values, other.values)):
        if made is not None and tensor is not None:
            made[mine] = tensor[taken]
    return replace(own, keys=keys, values=values)


def _like(own: KVSample, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Zeros `[t, l, h, d]` for the tokens of `own`."""
    return None if tensor is None else tensor.new_zeros((len(own), *tensor.shape[1:]))


def _true(targets: Targets, seed: int = 0) -> Targets:
    return targets


TARGETS: Final[Mapping[str, Callable[..., Targets]]] = {
    "true": _true,
    "shuffled": ShuffledTargets,
    "shuffled-tokens": TokenShuffledTargets,
    "random": RandomTargets,
}
"""What a student may be trained on, made of the true targets and a seed."""
