"""Fusing several teachers: against plain float64 loops, and what must hold of any weights and any teachers."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.targets import write_targets
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kava.errors import AlignmentError, SampleFailedError, StageError, StoreError
from kava.pipeline.fuse.fusion import Fusion, fused_manifest, measure_fusion
from kava.pipeline.fuse.rules import RULES, Blend, Correlations, Weighting, normalised
from kava.pipeline.fuse.view import FusedTargets, take_survey
from kava.store import KVSample, KVStore, Split

LENGTHS = [9, 4, 12, 1, 7, 10, 8]
NAMES = ("keys", "values")


def view_of(
    stores: Mapping[str, KVStore], weighting: Weighting | None = None, calibration: list[int] | None = None
) -> FusedTargets:
    stores = dict(sorted(stores.items()))
    weighting = weighting or Weighting()
    manifest = fused_manifest({n: s.manifest for n, s in stores.items()}, weighting, "calibration")
    chosen = range(len(next(iter(stores.values())))) if calibration is None else calibration
    return FusedTargets(Path("fused.json"), stores, measure_fusion(stores, manifest, weighting, chosen))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KVStore]:
    """Three teachers; sample 4 failed in the first, sample 5 in all."""
    root = tmp_path_factory.mktemp("targets")
    failed = ([4, 5], [5], [5])
    return {name: write_targets(root, LENGTHS, k, failed=failed[k]) for k, name in enumerate("abc")}


# The oracle: everything again, sample by sample and number by number.


def oracle_weights(rule: str, stores: Mapping[str, KVStore], index: int, share: list[float], t: float) -> list[float]:
    there = [index not in _failed(s) for s in stores.values()]
    signals = [s[index].extras if ok else {} for s, ok in zip(stores.values(), there, strict=True)]
    if sum(there) == 0:
        return [0.0] * len(there)
    if rule == "fixed":
        raw = [w if ok else 0.0 for w, ok in zip(share, there, strict=True)]
    elif sum(there) == 1 or not all(s["predicted_tokens"] for s in signals if s):
        raw = [float(ok) for ok in there]
    elif rule == "confidence":
        losses = [float(s["nats"]) / float(s["text_bytes"]) / t if s else None for s in signals]
        total = sum(math.exp(x) for x in losses if x is not None)
        raw = [0.0 if x is None else (1 - math.exp(x) / total) / (sum(there) - 1) for x in losses]
        assert sum(raw) == pytest.approx(1), "CA-MKD's weights sum to one by themselves"
    else:
        per_byte = [float(s["entropy"] * s["predicted_tokens"] / s["text_bytes"]) if s else None for s in signals]
        entropies = sum(h for h in per_byte if h is not None)
        raw = [0.0 if h is None else 1 - h / entropies for h in per_byte]
    return [w / sum(raw) for w in raw]


def _failed(store: KVStore) -> set[int]:
    size = store.manifest.samples_per_part
    return {number * size + p for number in store.committed_parts() for p in store.part(number).failed}


def oracle(stores: Mapping[str, KVStore], weights: dict[int, list[float]]) -> dict[int, dict[str, Any]]:
    """Keys and values of every sample in float64, `[t, h, d]` for each layer."""
    teachers, k = list(stores.values()), len(stores)
    shape = teachers[0].geometry.shape
    samples: list[list[Any]] = [[None if i in _failed(s) else s[i] for s in teachers] for i in range(len(teachers[0]))]
    firsts: list[Any] = [next((s for s in found if s is not None), None) for found in samples]
    out: dict[int, dict[str, Any]] = {i: {} for i, w in weights.items() if any(w)}
    train = [w for i, w in weights.items() if any(w) and firsts[i].split == Split.TRAIN]
    share = [sum(w[n] for w in train) / len(train) for n in range(k)]
    for name, layer in itertools.product(NAMES, range(shape[0])):

        def rows(sample: Any, name: str = name, layer: int = layer) -> Any:
            return getattr(sample, name)[:, layer].double().numpy()

        own = [np.concatenate([rows(s[n])[s[n].mask].ravel() for s in samples if s[n]]) for n in range(k)]
        mean, std = [x.mean() for x in own], [x.std() for x in own]
        correlation = np.eye(k)
        for i, j in itertools.permutations(range(k), 2):
            both = [(s[i], s[j], s[i].mask & s[j].mask) for s in samples if s[i] and s[j]]
            x, y = (np.concatenate([rows(s[at])[s[2]].ravel() for s in both]) for at in (0, 1))
            correlation[i, j] = np.corrcoef(x, y)[0, 1]
        for index, made in out.items():
            fused = np.zeros((len(firsts[index]), *shape[1:]))
            for token in range(len(fused)):
                active = [n for n, s in enumerate(samples[index]) if s and s.mask[token]]
                if not active:
                    continue
                w = np.array([weights[index][n] for n in active]) / sum(weights[index][n] for n in active)
                z = np.zeros(shape[1:])
                for m, n in enumerate(active):
                    z += w[m] * (rows(samples[index][n])[token] - mean[n]) / std[n]
                z /= math.sqrt(w @ correlation[np.ix_(active, active)] @ w)
                fused[token] = np.dot(share, mean) + np.dot(share, std) * z
            made.setdefault(name, []).append(fused)
    return out


RULES_TESTED = [
    Weighting("fixed"),
    Weighting("fixed", (3.0, 1.0, 0.5)),
    Weighting("confidence"),
    Weighting("confidence", temperature=0.2),
    Weighting("entropy"),
]


def test_every_rule_is_tested() -> None:
    assert {w.rule for w in RULES_TESTED} == set(RULES)


@pytest.mark.parametrize("weighting", RULES_TESTED, ids=lambda w: f"{w.rule}-{w.temperature}-{len(w.fixed)}")
def test_against_plain_loops(three: dict[str, KVStore], weighting: Weighting) -> None:
    view = view_of(three, weighting)
    share = list(weighting.fixed or (1.0, 1.0, 1.0))
    weights = {i: oracle_weights(weighting.rule, three, i, share, weighting.temperature) for i in range(len(view))}
    wanted = oracle(three, weights)
    assert sorted(wanted) == view.indices() == [0, 1, 2, 3, 4, 6]
    for index, tensors in wanted.items():
        made = view[index]
        np.testing.assert_allclose(made.extras["weights"], weights[index], rtol=1e-12)
        masks = [s[index].mask for s in three.values() if index not in _failed(s)]
        np.testing.assert_array_equal(made.mask, np.any(masks, axis=0))
        for name in NAMES:
            np.testing.assert_allclose(getattr(made, name), np.stack(tensors[name], 1), rtol=1e-5, atol=1e-5)
    assert view[4].extras["weights"][0] == 0
    with pytest.raises(SampleFailedError, match=r"a: teacher 0 cannot; b: teacher 1 cannot; c: "):
        view[5]
    assert view.failed == {"sample-5": "a: teacher 0 cannot; b: teacher 1 cannot; c: teacher 2 cannot"}
    assert view.indices(Split.HELDOUT) == [2]


def test_an_order_of_teachers_changes_nothing(three: dict[str, KVStore]) -> None:
    one, two = view_of(three), view_of({name: three[name] for name in "cab"})
    assert one.manifest.fingerprint == two.manifest.fingerprint
    for index in one.indices():
        assert torch.equal(one[index].keys, two[index].keys)  # type: ignore[arg-type]
    # Other names, and so another order of sums: the same up to rounding.
    renamed = view_of(dict(zip("zyx", three.values(), strict=True)), Weighting("entropy"))
    plain = view_of(three, Weighting("entropy"))
    for index in plain.indices():
        np.testing.assert_allclose(renamed[index].keys, plain[index].keys, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
        np.testing.assert_allclose(renamed[index].extras["weights"][::-1], plain[index].extras["weights"], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", list(RULES))
def test_one_teacher_is_itself(tmp_path: Path, rule: str, dtype: str) -> None:
    store = write_targets(tmp_path, LENGTHS, 0, failed=[2], dtype=dtype)
    view = view_of({"only": store}, Weighting(rule))
    assert view.manifest.model == store.manifest.model
    for index in store.indices():
        made, own = view[index], store[index]
        for name in NAMES:
            np.testing.assert_array_equal(getattr(made, name)[own.mask].float(), getattr(own, name)[own.mask].float())
        np.testing.assert_array_equal(made.mask, own.mask)
        assert made.extras["weights"].tolist() == [1]


def test_teachers_that_say_the_same_change_nothing(tmp_path: Path) -> None:
    store = write_targets(tmp_path, LENGTHS, 0)
    view = view_of(dict.fromkeys("abc", store), Weighting("confidence"))
    for index in store.indices():
        own = store[index]
        for name in NAMES:
            one, two = (getattr(sample, name)[own.mask] for sample in (view[index], own))
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_teacher_without_any_target_counts_for_nothing(tmp_path: Path, three: dict[str, KVStore]) -> None:
    def masked(made: KVSample) -> KVSample:
        zero = torch.zeros_like(made.keys)  # type: ignore[arg-type]
        return replace(made, keys=zero, values=zero, mask=np.zeros(len(made), np.bool_))

    silent = write_targets(tmp_path, LENGTHS, 3, change=masked)
    with_it, without = view_of({**three, "d": silent}), view_of(three)
    for index in without.indices():
        for name in NAMES:
            found = getattr(with_it[index], name)
            assert found.isfinite().all()
            np.testing.assert_allclose(found, getattr(without[index], name), rtol=1e-5, atol=1e-5)
    # Sample 5 failed in all others: it is there, without a target.
    assert not with_it[5].mask.any()
    assert not with_it[5].keys.any()  # type: ignore[union-attr]
    with pytest.raises(StageError, match="no teacher has a target"):
        view_of({"d": silent})


# What holds of any weights.

_there = hnp.arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 4)))


@given(st.data(), _there, st.sampled_from(list(RULES)), st.floats(0.01, 100))
def test_weights_sum_to_one_over_who_is_there(data: st.DataObject, there: Any, rule: str, temperature: float) -> None:
    numbers = st.floats(0, 50, width=32) | st.just(float("nan"))
    told = data.draw(hnp.arrays(np.float64, there.shape, elements=numbers))
    share = tuple(data.draw(st.lists(st.floats(0.1, 9), min_size=there.shape[1], max_size=there.shape[1])))
    weighting = Weighting(rule, share if rule == "fixed" else (), temperature)
    weights = weighting(there, told)
    np.testing.assert_allclose(weights.sum(1), there.any(1), atol=1e-12)
    assert (weights[~there] == 0).all()
    assert (weights >= 0).all()
    order = data.draw(st.permutations(range(there.shape[1])))
    moved = replace(weighting, fixed=tuple(share[k] for k in order) if rule == "fixed" else ())
    np.testing.assert_allclose(moved(there[:, order], told[:, order]), weights[:, order], atol=1e-12)


def test_the_surer_teacher_counts_more_and_more_so_when_cold() -> None:
    there, told = np.ones((1, 2), np.bool_), np.array([[0.4, 0.9]])
    warm, cold = (Weighting("confidence", temperature=t)(there, told)[0] for t in (1.0, 0.1))
    assert 0.5 < warm[0] < cold[0] < 1
    # Of two, each has the other's share of the softmax.
    assert warm[0] == pytest.approx(1 / (1 + math.exp(0.4 - 0.9)))
    np.testing.assert_allclose(Weighting("entropy")(there, told)[0], [0.9 / 1.3, 0.4 / 1.3])


@given(st.integers(2, 4), st.integers(0, 2**32), st.floats(-0.9, 0.95))
def test_variance_is_the_common_one(teachers: int, seed: int, like: float) -> None:
    """Independent, correlated and anticorrelated teachers of any scale: fusing keeps the spread, an average does not."""
    rng = np.random.default_rng(seed)
    like = max(like, -0.9 / (teachers - 1))
    mixing = np.linalg.cholesky(like + (1 - like) * np.eye(teachers))
    z = np.einsum("ij,jn->in", mixing, rng.standard_normal((teachers, 4000)))
    mean, std = rng.uniform(-5, 5, (teachers, 1)), rng.uniform(0.1, 10, (teachers, 1))
    tensors = [torch.from_numpy(x).view(500, 1, 2, 4) for x in z * std + mean]
    masks = np.ones((teachers, 500), np.bool_)
    correlations = Correlations(teachers, 1)
    standardised = [(x - mean[k, 0]) / std[k, 0] for k, x in enumerate(tensors)]
    for first in range(0, 500, 100):
        rows = slice(first, first + 100)
        correlations.add("keys", [x[rows] for x in standardised], masks[:, rows])
    weights = normalised(rng.uniform(0.2, 1, teachers), np.ones(teachers, np.bool_))
    matrix = correlations.matrices()
    np.testing.assert_allclose(matrix["keys"][0], np.corrcoef(z), atol=1e-9)
    blend = Blend(tuple("abcd"[:teachers]), {"keys": mean}, {"keys": std}, matrix, weights)
    fused = blend("keys", tensors, weights, masks).double()
    assert float(fused.std() / blend.common("keys")[1][0]) == pytest.approx(1, abs=0.06)
    assert float(fused.mean() - blend.common("keys")[0][0]) == pytest.approx(0, abs=0.2 * blend.common("keys")[1][0])


def test_a_plain_average_would_shrink() -> None:
    """Why the sum is divided: of four teachers that disagree, the average has half the spread."""
    torch.manual_seed(0)
    tensors = [torch.randn(4000, 1, 1, 1) for _ in range(4)]
    quarter, masks = np.full(4, 0.25), np.ones((4, 4000), np.bool_)
    ones = {"keys": np.ones((4, 1))}
    blend = Blend(tuple("abcd"), {"keys": np.zeros((4, 1))}, ones, {"keys": np.eye(4)[None]}, quarter)
    average = torch.stack(tensors).mean(0)
    fused = blend("keys", tensors, quarter, masks)
    assert float(average.std()) == pytest.approx(0.5, rel=0.05)
    assert float(fused.std()) == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(fused, 2 * average)


def test_teachers_that_cancel_or_never_meet_are_refused(tmp_path: Path) -> None:
    def negated(made: KVSample) -> KVSample:
        return replace(made, keys=-made.keys, values=-made.values)  # type: ignore[operator]

    one = write_targets(tmp_path / "one", LENGTHS, 0)
    two = write_targets(tmp_path / "two", LENGTHS, 0, change=negated)
    with pytest.raises(AlignmentError, match="the keys of a and b cancel in layer 0"):
        view_of({"a": one, "b": two})[0]
    view = view_of({"a": one, "b": one}, calibration=[])
    with pytest.raises(StageError, match="no calibration token has targets of both a and b"):
        view[0]


# The view as a store.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_view_says_of_itself_what_a_store_of_it_says(tmp_path: Path, dtype: str) -> None:
    stores = {n: write_targets(tmp_path, LENGTHS, k, failed=[4 * k], dtype=dtype) for k, n in enumerate("ab")}
    view = view_of(stores, Weighting("confidence"))
    store = KVStore.create(tmp_path / "fused.zarr", view.manifest)
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(view.manifest.part_samples(part)):
                writer.append(position, view[index])
            writer.commit()
    assert store.manifest.fingerprint == view.manifest.fingerprint
    for split in (None, *Split):
        assert store.indices(split) == view.indices(split)
    for index in store.indices():
        made, read = view[index], store[index]
        for name in NAMES:
            assert torch.equal(getattr(made, name), getattr(read, name))
        for name in ("input_ids", "positions", "spans", "segments", "mask"):
            np.testing.assert_array_equal(getattr(made, name), getattr(read, name))
    for name, wanted in store.statistics().items():
        np.testing.assert_allclose(view.statistics()[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
    sent = pickle.loads(pickle.dumps(view))  # To processes that load batches.
    assert torch.equal(sent[1].keys, view[1].keys)  # type: ignore[arg-type]
    light = view.sample(0, keys=False)
    assert light.keys is None
    assert light.values is not None
    # Saved and read again, statistics and all.
    replace(view.fusion, survey=take_survey(view)).save(tmp_path / "fusion.json")
    again = FusedTargets.open(tmp_path / "fusion.json", {n: s.path for n, s in stores.items()})
    again.check()
    assert again.fusion.survey is not None
    assert torch.equal(again[1].keys, view[1].keys)  # type: ignore[arg-type]
    for name, wanted in view.statistics().items():
        np.testing.assert_array_equal(again.statistics()[name], wanted)


def test_what_overflows_the_storage_dtype_failed(tmp_path: Path) -> None:
    """As in a store, whose writer records it: two values near float16's end, brought to a larger scale."""

    def large(made: KVSample) -> KVSample:
        assert made.keys is not None
        keys = made.keys.clone()
        if made.sample_id == "sample-1":
            keys[0, 0, 0, 0], made.mask[0] = 6e4, True
        return replace(made, keys=keys)

    def louder(made: KVSample) -> KVSample:
        assert made.keys is not None
        return replace(made, keys=made.keys * 3000)

    stores = {
        "a": write_targets(tmp_path, LENGTHS, 0, dtype="float16", change=large),
        "b": write_targets(tmp_path, LENGTHS, 1, dtype="float16", change=louder),
    }
    view = view_of(stores)
    survey = take_survey(view)
    assert survey.overflowed == {1: "non-finite keys in layers [0]"}
    surveyed = FusedTargets(view.path, stores, replace(view.fusion, survey=survey))
    assert 1 not in surveyed.indices()
    assert surveyed.failed == {"sample-1": "non-finite keys in layers [0]"}
    with pytest.raises(SampleFailedError, match="non-finite keys"):
        surveyed[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_digest": "other"}, r"targets of a and b are not on one student's axes \(tokenizer_digest: t and"),
        ({"corpus_digest": "other"}, "corpus_digest: c and other"),
        ({"kind": "resampled"}, "kind: target and resampled"),
        ({"samples_per_part": 2}, "samples_per_part: 4 and 2"),
    ],
)
def test_other_axes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    stores = {"a": write_targets(tmp_path, [3], 0), "b": write_targets(tmp_path, [3], 1, **changes)}
    with pytest.raises(AlignmentError, match=message):
        view_of(stores)


def test_other_geometry_or_tokens_are_refused(tmp_path: Path) -> None:
    from kava.store import KVGeometry

    lengths = [6, 2, 5]
    one = write_targets(tmp_path, lengths, 0)
    other = KVGeometry(num_layers=2, num_key_value_heads=2, head_dim=8)
    with pytest.raises(AlignmentError, match="geometry: "):
        view_of({"a": one, "b": write_targets(tmp_path, lengths, 1, geometry=other)})

    def shifted(made: KVSample) -> KVSample:
        return replace(made, input_ids=made.input_ids + (made.sample_id == "sample-2"))

    two = write_targets(tmp_path, lengths, 2, change=shifted)
    message = r"sample 2 \('sample-2'\) is on other tokens in the targets of b than in those of a \(input_ids\)"
    with pytest.raises(AlignmentError, match=message):
        view_of({"a": one, "b": two})
    view = view_of({"a": one, "b": two}, calibration=[0, 1])
    with pytest.raises(AlignmentError, match=message):
        view[2]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    stores = {n: write_targets(tmp_path, LENGTHS, k, extras={}, change=_unsigned) for k, n in enumerate("ab")}
    with pytest.raises(
        StageError, match=r"0\.zarr has no nats, which fuse\.weights: confidence needs; capture it again"
    ):
        view_of(stores, Weighting("confidence"))
    view = view_of(stores)
    with pytest.raises(StageError, match="was made for other targets of b"):
        FusedTargets(view.path, {"a": stores["a"]}, view.fusion)
    stores["b"].drop_part(1)
    with pytest.raises(StageError, match=r"1\.zarr: 1 of 2 parts are missing"):
        view.check()
    assert view.missing_parts() == [1]
    assert view.indices() == [0, 1, 2, 3]
    (tmp_path / "broken.json").write_text('{"manifest": {}')
    with pytest.raises(StoreError, match=r"broken\.json is not readable"):
        Fusion.load(tmp_path / "broken.json")


def _unsigned(made: KVSample) -> KVSample:
    return replace(made, extras={})


def test_flat_targets_are_refused(tmp_path: Path) -> None:
    def flat(made: KVSample) -> KVSample:
        assert made.values is not None
        values = made.values.clone()
        values[:, 1] = 2
        return replace(made, values=values)

    stores = {"a": write_targets(tmp_path, LENGTHS, 0), "b": write_targets(tmp_path, LENGTHS, 1, change=flat)}
    with pytest.raises(StageError, match="the target values of layer 1 never vary, so b cannot be fused"):
        view_of(stores)
