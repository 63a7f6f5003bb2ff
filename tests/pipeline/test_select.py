"""Selection against plain loops in float64, and what must not change it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.stores import GEOMETRY, sample
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.pipeline.select.rules import SELECTORS, Candidates, Selector, redundancy_only
from kava.pipeline.select.stage import Selection
from kava.store import Segment


def _candidates(tokens: int, seed: int = 0, *, layers: int = 2, heads: int = 3, dim: int = 5) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, layers, heads, dim, generator=generator)
    importance = torch.randn(tokens, layers, heads, generator=generator).mul(2).softmax(0)
    return Candidates("s", keys, importance)


def _redundancy_in_loops(keys: list[list[float]]) -> list[float]:
    """Listing 1 of KaVa on one head without padding: all pairs, one by one."""
    unit = [[x / (math.sqrt(sum(y * y for y in key)) + 1e-8) for x in key] for key in keys]
    n = len(unit)
    logits = [
        sum(-sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for i in range(n) if i != j) / n
        for j in range(n)
    ]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def _standard_in_loops(scores: list[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((x - mean) ** 2 for x in scores) / len(scores))
    return [(x - mean) / spread if spread else 0.0 for x in scores]


def _scores_in_loops(found: Candidates, how: Selector, layer: int, head: int) -> list[float]:
    assert found.importance is not None
    attention = found.importance[:, layer, head].double().tolist()
    unlike = _redundancy_in_loops(found.keys[:, layer, head].double().tolist())
    n = len(attention)
    if how.method == "crop":
        return [float(i) for i in range(n)]
    if how.method == "uniform":
        kept = min(how.tokens, n)
        places = {n - 1} if kept == 1 else {math.floor(i * (n - 1) / (kept - 1) + 0.5) for i in range(kept)}
        return [float(i in places) for i in range(n)]
    if how.mix == "zscore" and how.method == "r-kv":
        attention, unlike = _standard_in_loops(attention), _standard_in_loops(unlike)
    share = {"r-kv": how.mix_lambda, "attention-only": 1.0, "redundancy-only": 0.0}[how.method]
    return [share * i + (1 - share) * r for i, r in zip(attention, unlike, strict=True)]


def _best_in_loops(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("mix", ["sum", "zscore"])
@pytest.mark.parametrize("mix_lambda", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("method", [name for name in SELECTORS if name != "random"])
def test_every_method_is_its_formula(method: str, mix_lambda: float, mix: Any, tokens: int) -> None:
    found, how = _candidates(20, seed=tokens), Selector(method, tokens, mix_lambda, mix)
    indices, scores = how(found)
    assert indices.shape == scores.shape == (min(tokens, 20), 2, 3)
    for layer in range(2):
        for head in range(3):
            expected = _scores_in_loops(found, how, layer, head)
            chosen = _best_in_loops(expected, tokens)
            assert indices[:, layer, head].tolist() == chosen
            np.testing.assert_allclose(scores[:, layer, head], [expected[i] for i in chosen], rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 35), st.sampled_from(sorted(SELECTORS)), st.integers(0, 2**31))
def test_all_that_fits_is_kept_in_order_and_only_once(count: int, tokens: int, method: str, seed: int) -> None:
    indices, scores = Selector(method, tokens)(_candidates(count, seed))
    assert len(indices) == min(count, tokens)
    assert bool((indices.diff(dim=0) > 0).all())
    assert not scores.isnan().any()
    if count <= tokens:
        assert (indices == torch.arange(count)[:, None, None]).all()


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from(["sum", "zscore"]), st.integers(0, 2**31))
def test_the_ends_of_the_mix_are_its_parts(count: int, tokens: int, mix: Any, seed: int) -> None:
    found = _candidates(count, seed)
    for mix_lambda, alone in ((1.0, "attention-only"), (0.0, "redundancy-only")):
        mixed, single = Selector("r-kv", tokens, mix_lambda, mix), Selector(alone, tokens)
        assert torch.equal(mixed(found)[0], single(found)[0])
        assert mixed.needs_importance == single.needs_importance or mix_lambda == 1.0
        assert mixed.compares_keys == single.compares_keys


@settings(deadline=None)
@given(st.integers(2, 25), st.sampled_from([0.25, 8.0, 3.7]), st.integers(0, 2**31))
def test_unlikeness_moves_with_the_tokens_and_knows_no_scale(count: int, scale: float, seed: int) -> None:
    found, how = _candidates(count, seed), Selector("redundancy-only", 3)
    own = redundancy_only(found, how)
    torch.testing.assert_close(own.sum(0), torch.ones(2, 3, dtype=torch.float64))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(redundancy_only(Candidates("s", found.keys[order], None), how), own[order])
    torch.testing.assert_close(redundancy_only(Candidates("s", found.keys * scale, None), how), own, rtol=1e-6, atol=0)
    # And every head by itself.
    alone = redundancy_only(Candidates("s", found.keys[:, 1:, 2:], None), how)
    torch.testing.assert_close(alone, own[:, 1:, 2:])


def test_equal_scores_go_to_the_earlier_token() -> None:
    found = Candidates("s", torch.ones(300, 1, 1, 4), torch.full((300, 1, 1), 1 / 300))
    for method in ("attention-only", "redundancy-only", "r-kv"):
        for mix in ("sum", "zscore"):
            indices, _ = Selector(method, 5, 0.3, mix)(found)
            assert indices[:, 0, 0].tolist() == [0, 1, 2, 3, 4], method


def test_random_is_of_the_sample_and_the_seed() -> None:
    found = _candidates(60)
    one, again = (Selector("random", 8, seed=1)(found)[0] for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, Selector("random", 8, seed=2)(found)[0])
    assert not torch.equal(one, Selector("random", 8, seed=1)(Candidates("t", found.keys, None))[0])
    assert not torch.equal(one[:, 0, 0], one[:, 1, 2])
    counts = np.zeros(60)
    for number in range(200):
        chosen = Selector("random", 8)(Candidates(str(number), found.keys, None))[0]
        counts += np.bincount(chosen.flatten(), minlength=60)
    assert counts.min() > 0.7 * counts.mean()


def test_importance_that_is_not_there_is_an_error() -> None:
    found = Candidates("s", torch.ones(3, 1, 1, 4), None)
    with pytest.raises(AlignmentError, match="r-kv needs importance, sample 's' has none"):
        Selector("r-kv", 2)(found)
    Selector("r-kv", 2, mix_lambda=0.0)(found)


@settings(deadline=None)
@given(
    st.integers(0, 12),
    st.integers(0, 15),
    st.integers(1, 14),
    st.sampled_from(sorted(SELECTORS)),
    st.integers(0, 2**31),
)
def test_tokens_of_other_segments_change_nothing(count: int, others: int, slots: int, method: str, seed: int) -> None:
    """A rationale among other tokens, whatever they hold, and the rationale alone: the same slots to the last bit."""
    assume(count + others)
    rng = np.random.default_rng(seed)
    whole = sample(seed, count + others)
    assert whole.keys is not None
    assert whole.values is not None
    places = np.sort(rng.permutation(count + others)[:count])
    whole.segments[:] = Segment.PROMPT
    whole.segments[places] = Segment.RATIONALE
    importance = np.full((len(whole), *GEOMETRY.shape[:2]), np.nan, np.float32)
    importance[places] = rng.random((count, *GEOMETRY.shape[:2]))
    whole.extras["importance"] = importance
    selection = Selection("", "", "", Selector(method, slots), int(Segment.RATIONALE), None, None)
    made = selection.slots(whole, places)
    alone = selection.slots(
        type(whole)(
            whole.sample_id, whole.split, whole.keys[places], whole.values[places],
            *(getattr(whole, name)[places] for name in ("input_ids", "positions", "spans", "segments", "mask")),
            extras={"importance": importance[places]},
        ),
        np.arange(count),
    )  # fmt: skip
    kept = min(count, slots)
    assert made.mask.tolist() == [True] * kept + [False] * (slots - kept)
    for name in ("keys", "values"):
        found = getattr(made, name)
        assert torch.equal(found, getattr(alone, name))
        assert not found[kept:].any()
    np.testing.assert_array_equal(made.extras["scores"], alone.extras["scores"])
    indices = made.extras["indices"]
    np.testing.assert_array_equal(indices[:kept], places[alone.extras["indices"][:kept]])
    assert (indices[kept:] == -1).all()
    assert np.isnan(made.extras["scores"][kept:]).all()
    for layer in range(GEOMETRY.num_layers):
        for head in range(GEOMETRY.num_key_value_heads):
            for slot in range(kept):
                assert made.keys is not None
                assert torch.equal(made.keys[slot, layer, head], whole.keys[indices[slot, layer, head], layer, head])
