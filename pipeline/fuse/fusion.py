"""How several teachers' targets are fused: everything that is the same for all samples of a run, in one small file.

Moments and average weights are of all targets, correlations of the calibration samples. The file says of itself which
parts of which targets it was measured on: when one of them is made again, so is everything that was fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import AlignmentError, StageError, StoreError, StoreNotFoundError
from ...store import ExtraArray, KVSample, KVStore, Manifest, ModelIdentity, Split, digest_json
from ...store.files import write_atomic
from ...store.sealed import read_sealed, sealed_text
from ..maps.moments import NAMES
from .rules import RULES, Array, Blend, Correlations, Weighting

if TYPE_CHECKING:
    import torch

_AXES: Final = (
    "kind",
    "geometry",
    "tokenizer_digest",
    "chat_template_digest",
    "corpus_digest",
    "num_samples",
    "samples_per_part",
)
"""What targets must share to be fused."""
_ROWS: Final = ("input_ids", "positions", "spans", "segments")


def fused_manifest(targets: Mapping[str, Manifest], weighting: Weighting, calibration: str | None) -> Manifest:
    """The manifest of the targets fused from these: the same for the view and for the store.

    Args:
        targets: the manifest of each teacher's targets, in the order of `weighting`: by name.
        weighting: how they are weighed.
        calibration: the digest of the corpus that correlations are measured on; one teacher has none.

    Raises:
        AlignmentError: if they are not of one student, naming what differs.
    """
    first, *others = targets
    for name in others:
        mine, theirs = (targets[n].model_dump(mode="json", include={*_AXES}) for n in (first, name))
        if found := [f"{axis}: {mine[axis]} and {theirs[axis]}" for axis in _AXES if mine[axis] != theirs[axis]]:
            raise AlignmentError(
                f"fuse: the targets of {first} and {name} are not on one student's axes ({'; '.join(found)}); make "
                "them again with kava project"
            )
    how: dict[str, Any] = {"teachers": list(targets), "weights": weighting.rule}
    if weighting.rule == "fixed":
        share = weighting.fixed or (1.0,) * len(targets)
        how["fixed"] = [number / sum(share) for number in share]
    if weighting.rule == "confidence":
        how["temperature"] = weighting.temperature
    if len(targets) > 1:
        how["calibration"] = calibration
    models = [manifest.model for manifest in targets.values()]
    model = models[0]
    if others:
        computed = {m.compute_dtype for m in models}
        model = ModelIdentity(
            id=" + ".join(m.id for m in models),
            weights_digest=digest_json([m.model_dump(mode="json") for m in models]),
            compute_dtype=computed.pop() if len(computed) == 1 else "several dtypes",
        )
    kept = targets[first].model_dump(exclude={"fingerprint", "versions"})
    weights = ExtraArray(axis="sample", dtype="float64", shape=(len(targets),))
    return Manifest(
        **kept
        | {
            "model": model,
            "parameters": {"fuse": how},
            "parents": {name: manifest.fingerprint for name, manifest in targets.items()},
            "extras": {"weights": weights},
        }
    )


@dataclass(frozen=True)
class Survey:
    """What only a pass over all fused targets tells: what the parts of a store would say of themselves."""

    tokens: int
    """With a target."""
    sums: Mapping[str, Array]
    """`keys` and `values`, each `[2, l]` float64: of the numbers, and of their squares."""
    overflowed: Mapping[int, str]
    """Samples that are not finite in the storage dtype, with the reason."""


FUSION_BYTES: Final = 256 << 20
"""Size limit of a saved fusion, which names every sample that overflowed."""


@dataclass(frozen=True)
class Fusion:
    """How to fuse: everything that is the same for all samples."""

    manifest: Manifest
    key: str
    """What it was measured on: a digest of the manifest and of every part of every teacher's targets."""
    weighting: Weighting
    blend: Blend
    survey: Survey | None = None

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        blend, weighting = self.blend, self.weighting
        raw: dict[str, Any] = {
            "manifest": self.manifest.model_dump(mode="json", exclude={"fingerprint"}),
            "key": self.key,
            "weighting": {"rule": weighting.rule, "fixed": weighting.fixed, "temperature": weighting.temperature},
            "teachers": blend.teachers,
            **{name: _lists(getattr(blend, name)) for name in ("mean", "std", "correlation")},
            "share": blend.share.tolist(),
            "survey": None,
        }
        if self.survey is not None:
            overflowed = {str(index): reason for index, reason in self.survey.overflowed.items()}
            raw["survey"] = {"tokens": self.survey.tokens, "sums": _lists(self.survey.sums), "overflowed": overflowed}
        write_atomic(path, sealed_text(raw))

    @classmethod
    def load(cls, path: Path) -> Fusion:
        """Reads what `save` wrote.

        Raises:
            StoreNotFoundError: if there is none.
            DamagedStoreError: if it is not as it was written.
            StoreError: if it is none.
        """
        try:
            raw = read_sealed(path, FUSION_BYTES)
        except FileNotFoundError:
            raise StoreNotFoundError(f"{path} is not made yet; kava fuse") from None
        try:
            arrays = {name: _arrays(raw[name]) for name in ("mean", "std", "correlation")}
            survey = raw["survey"]
            if survey is not None:
                overflowed = {int(index): reason for index, reason in survey["overflowed"].items()}
                survey = Survey(survey["tokens"], _arrays(survey["sums"]), overflowed)
            return cls(
                Manifest.model_validate(raw["manifest"]),
                raw["key"],
                Weighting(**(raw["weighting"] | {"fixed": tuple(raw["weighting"]["fixed"])})),
                Blend(teachers=tuple(raw["teachers"]), share=np.array(raw["share"]), **arrays),
                survey,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise StoreError(f"{path} is not readable: {error}; remove it, kava fuse makes it again") from None


def fusion_key(stores: Mapping[str, KVStore], manifest: Manifest) -> str:
    """What a fusion is measured on: every part of every teacher's targets.

    Raises:
        StageError: if some are missing.
    """
    for store in stores.values():
        if absent := store.missing_parts():
            raise StageError(
                f"{store.path}: {len(absent)} of {store.manifest.num_parts} parts are missing; make them first"
            )
    parts = {name: [s.part(n).content for n in s.committed_parts()] for name, s in sorted(stores.items())}
    return digest_json({"manifest": manifest.fingerprint, "parts": parts})


def measure_fusion(
    stores: Mapping[str, KVStore], manifest: Manifest, weighting: Weighting, calibration: Iterable[int]
) -> Fusion:
    """Works out how to fuse: average weights from all samples, correlations from some.

    Args:
        stores: each teacher's targets, complete, in the order of `weighting`.
        manifest: of the fused targets.
        weighting: how they are weighed.
        calibration: samples that correlations are measured on, read once.

    Raises:
        StageError: if a capture has no confidence that the weights need, or targets of a teacher never vary.
        AlignmentError: if the teachers' targets are on different tokens.
    """
    key = fusion_key(stores, manifest)
    statistics = [store.statistics() for store in stores.values()]
    mean, std = (
        {name: np.stack([found[f"{name}_{which}"] for found in statistics]) for name in NAMES}
        for which in ("mean", "std")
    )
    covered = np.array([any(s.part(n).target_tokens for n in s.committed_parts()) for s in stores.values()])
    for k, (teacher, store) in enumerate(stores.items()):
        for name in NAMES:
            if covered[k] and len(flat := np.flatnonzero(~(std[name][k] > 0))):
                raise StageError(
                    f"{store.path}: the target {name} of layer {flat[0]} never vary, so {teacher} cannot be fused; "
                    "choose another projection"
                )
    if not covered.any():
        raise StageError("fuse: no teacher has a target for any token")
    share = _share(stores, weighting, covered)
    correlations = Correlations(len(stores), manifest.geometry.num_layers)
    for index in calibration if len(stores) > 1 else ():
        found = read_teachers(stores, index)
        there = [sample for sample in found if sample is not None]
        if len(there) < 2:
            continue
        masks = np.stack([np.zeros(len(there[0]), np.bool_) if s is None else s.mask for s in found])
        for name in NAMES:
            shape = (len(there[0]), *manifest.geometry.shape)
            correlations.add(name, [_standardised(s, name, mean, std, k, shape) for k, s in enumerate(found)], masks)
    blend = Blend(tuple(stores), mean, std, correlations.matrices(), share)
    return Fusion(manifest, key, weighting, blend)


def read_teachers(
    stores: Mapping[str, KVStore], index: int, *, keys: bool = True, values: bool = True
) -> list[KVSample | None]:
    """One sample of every teacher; None where it failed.

    Raises:
        AlignmentError: if they are on different tokens.
    """
    found: list[KVSample | None] = []
    first: tuple[str, KVSample] | None = None
    for name, store in stores.items():
        number, position = divmod(index, store.manifest.samples_per_part)
        if position in store.part(number).failed:
            found.append(None)
            continue
        sample = store.sample(index, keys=keys, values=values, extras=False)
        found.append(sample)
        if first is None:
            first = name, sample
            continue
        differing = [n for n in _ROWS if not np.array_equal(getattr(sample, n), getattr(first[1], n))]
        if sample.sample_id != first[1].sample_id or differing:
            what = ", ".join(differing) or f"ids {first[1].sample_id!r} and {sample.sample_id!r}"
            raise AlignmentError(
                f"fuse: sample {index} ({sample.sample_id!r}) is on other tokens in the targets of {name} than in "
                f"those of {first[0]} ({what}); make them again with kava project"
            )
    return found


def told(stores: Mapping[str, KVStore], weighting: Weighting, number: int) -> tuple[Array, Array]:
    """Of the samples of a part, `[n, k]` each: who did not fail, and what the rule goes by."""
    there = np.ones((len(next(iter(stores.values())).manifest.part_samples(number)), len(stores)), np.bool_)
    found = np.zeros(there.shape)
    measure = RULES[weighting.rule].measure
    for column, store in enumerate(stores.values()):
        part = store.part(number)
        there[list(part.failed), column] = False
        if measure is None:
            continue
        if measure not in store.manifest.extras:
            raise StageError(
                f"{store.path} has no {measure}, which fuse.weights: {weighting.rule} needs; capture it again with "
                "extract.confidence: true (kava extract --force)"
            )
        numbers = part.per_sample
        amount = numbers[measure] * (numbers["predicted_tokens"] if measure == "entropy" else 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[:, column] = amount / numbers["text_bytes"]
    return there, found


def _share(stores: Mapping[str, KVStore], weighting: Weighting, covered: Array) -> Array:
    """`[k]`: average weights over the training samples, or over all where there are none."""
    first = next(iter(stores.values()))
    sums, counts = np.zeros((2, len(stores))), np.zeros((2, 1))
    for number in range(first.manifest.num_parts):
        there, measured = told(stores, weighting, number)
        weights = weighting(there & covered, measured)
        train = np.zeros(len(there), np.bool_)
        for store in stores.values():
            train |= store.part(number).splits == int(Split.TRAIN)
        for row, chosen in enumerate((train, np.ones_like(train))):
            sums[row] += weights[chosen].sum(0)
            counts[row] += weights[chosen].any(1).sum()
    row = 0 if counts[0, 0] else 1
    return np.asarray(sums[row] / counts[row])


def _standardised(
    sample: KVSample | None,
    name: str,
    mean: Mapping[str, Array],
    std: Mapping[str, Array],
    k: int,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """`[t, l, h, d]` float32; zeros where there is nothing, which no mask lets through."""
    import torch

    if sample is None:
        return torch.zeros(shape)
    m, s = (torch.from_numpy(array[name][k]).float()[None, :, None, None] for array in (mean, std))
    tensor: torch.Tensor = getattr(sample, name)
    return (tensor.float() - m) / s.where(s > 0, 1)


def _lists(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


def _arrays(lists: dict[str, Any]) -> dict[str, Array]:
    return {name: np.array(found, np.float64) for name, found in lists.items()}
