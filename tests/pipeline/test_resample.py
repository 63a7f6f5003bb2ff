from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tokenizers import byte_level_tokenizer, gpt2_tokenizer, qwen_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import AlignmentError
from kava.extract import Encoder, Record, Tokens
from kava.pipeline.maps.resample import (
    RESAMPLERS,
    TimeMap,
    coverage,
    identity_map,
    last,
    linear_weights,
    mean,
    time_map,
)
from kava.store import Segment


def _spans(*ends: int) -> np.ndarray[Any, Any]:
    """Adjoining spans with these ends; a repeated end is an empty span."""
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int32)


def _equal_spans(count: int) -> np.ndarray[Any, Any]:
    return _spans(*range(1, count + 1)) if count else np.zeros((0, 2), np.int32)


def _cut(text_length: int, cuts: list[int]) -> np.ndarray[Any, Any]:
    inner = sorted({c % text_length for c in cuts} - {0})
    return _spans(*inner, text_length)


@pytest.mark.parametrize(("source", "target"), [(80, 50), (100, 60), (1, 1), (50, 80), (2, 9), (9, 2), (1, 4)])
@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_time_by_index(method: str, source: int, target: int) -> None:
    time = RESAMPLERS[method](_equal_spans(source), _equal_spans(target))
    ramp = torch.arange(source, dtype=torch.float64)[:, None, None, None] * torch.ones(1, 2, 2, 4)
    out = time.apply(ramp)
    assert out.shape == (target, 2, 2, 4)
    assert time.mask.all()
    if target > 1:
        assert torch.equal(out[0], ramp[0])
    assert torch.equal(out[-1], ramp[-1])
    assert (out.diff(dim=0) >= 0).all()
    if method == "linear" and target > 1:
        wanted = torch.linspace(0, source - 1, target, dtype=torch.float64)
        torch.testing.assert_close(out[:, 0, 0, 0], wanted, rtol=0, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 130), st.integers(0, 130))
def test_linear_weights_for_any_lengths(source: int, target: int) -> None:
    rows, columns, weights = linear_weights(source, target)
    time = TimeMap(source, target, rows, columns, weights)
    if source == 0:
        assert not time.mask.any()
        return
    matrix = time.dense()
    np.testing.assert_allclose(matrix.sum(1), np.ones(target), atol=1e-12)
    assert (matrix >= 0).all()
    if source == target:
        np.testing.assert_array_equal(matrix, np.eye(source))
    if target > 1:
        np.testing.assert_allclose(matrix @ np.arange(source), np.linspace(0, source - 1, target), atol=1e-9)
        np.testing.assert_array_equal(matrix[0], np.eye(source)[0])
    if target:
        np.testing.assert_array_equal(matrix[-1], np.eye(source)[-1])


@pytest.mark.parametrize("method", RESAMPLERS)
def test_nothing_to_read_from_is_masked(method: str) -> None:
    time = RESAMPLERS[method](_equal_spans(0), _equal_spans(10))
    assert time.num_target == 10
    assert not time.mask.any()
    assert not time.apply(torch.ones(0, 2, 2, 4)).any()
    special = np.zeros((3, 2), np.int32)
    assert not RESAMPLERS[method](special, _equal_spans(2)).mask.any()
    assert RESAMPLERS[method](_equal_spans(2), special).mask.tolist() == [False] * 3


@pytest.mark.parametrize("method", RESAMPLERS)
def test_equal_tokens_are_the_identity(method: str) -> None:
    spans = _spans(3, 7, 8, 8, 12)  # One empty span: a special token.
    time = RESAMPLERS[method](spans, spans)
    assert time.mask.tolist() == [True, True, True, False, True]
    tensor = torch.randn(5, 2, 2, 4)
    assert torch.equal(time.apply(tensor)[time.mask], tensor[time.mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", RESAMPLERS)
def test_applying_is_the_matrix_product(method: str, dtype: torch.dtype) -> None:
    """Masked rows are zero though the source's first token is not finite; sums of narrow numbers are in float32."""
    source, target = _spans(2, 2, 5, 9, 14, 14), _spans(1, 4, 5, 5, 11, 14)
    time = RESAMPLERS[method](source, target)
    tensor = torch.randn((6, 2, 3, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = time.dense() @ tensor.double().flatten(1).numpy()
    made = time.apply(tensor)
    gathered = len(time.rows) == int(time.mask.sum())
    assert made.dtype == (dtype if gathered else torch.promote_types(dtype, torch.float32))
    np.testing.assert_allclose(made.double().flatten(1), wanted, rtol=0, atol=0 if gathered else 1e-6)
    if gathered:
        tensor[0] = torch.nan
        assert not time.apply(tensor)[torch.from_numpy(~time.mask)].any()


def test_foreign_indices_raise() -> None:
    one = np.ones(1)
    for rows, columns in (([0], [80]), ([0], [-1]), ([50], [0])):
        with pytest.raises(AlignmentError, match="outside of"):
            TimeMap(80, 50, np.array(rows), np.array(columns), one)
    with pytest.raises(AlignmentError, match="made for 80 source tokens, got 81"):
        TimeMap(80, 50, np.array([0]), np.array([79]), one).apply(torch.zeros(81, 1, 1, 1))


def test_last_by_hand() -> None:
    source, target = _spans(2, 5, 9, 9, 12), _spans(1, 2, 7, 12)
    time = last(source, target)
    assert time.mask.tolist() == [False, True, True, True]
    assert dict(zip(time.rows.tolist(), time.columns.tolist(), strict=True)) == {1: 0, 2: 1, 3: 4}


def test_mean_by_hand() -> None:
    matrix = mean(_spans(2, 5, 9), _spans(1, 4, 9)).dense()
    np.testing.assert_allclose(matrix, np.array([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 1 / 5, 4 / 5]]))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 100), max_size=30), st.lists(st.integers(0, 100), max_size=30))
def test_last_never_looks_past_the_students_own_end(size: int, one: list[int], two: list[int]) -> None:
    source, target = _cut(size, one), _cut(size, two)
    time = last(source, target)
    assert (source[time.columns, 1] <= target[time.rows, 1]).all()
    for row, column in zip(time.rows, time.columns, strict=True):
        assert column == max(i for i, (_, stop) in enumerate(source) if stop <= target[row, 1])
    assert time.mask[-1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 100), max_size=30), st.lists(st.integers(0, 100), max_size=30))
def test_mean_is_the_overlap(size: int, one: list[int], two: list[int]) -> None:
    source, target = _cut(size, one), _cut(size, two)
    low = np.maximum(source[None, :, 0], target[:, None, 0])
    high = np.minimum(source[None, :, 1], target[:, None, 1])
    overlap = np.maximum(high - low, 0)
    np.testing.assert_allclose(mean(source, target).dense(), overlap / overlap.sum(1, keepdims=True))


@pytest.mark.parametrize("method", RESAMPLERS)
def test_real_tokenizer_pairs_align(method: str) -> None:
    text = "Él pagó $1,234.50 — 東京 🙂 and 3/4 of 99 % more.\nIt was 12 + 30 = 42."
    record = Record("id", text, ((0, len(text), Segment.ANSWER),), (("user", 0, len(text)),))
    encoders = [
        Encoder(t) for t in (qwen_tokenizer(), gpt2_tokenizer(), sentencepiece_tokenizer(), byte_level_tokenizer())
    ]
    for one in encoders:
        for two in encoders:
            source, target = one.encode(record), two.encode(record)
            time = RESAMPLERS[method](source.spans, target.spans)
            text_rows = target.spans[:, 1] > target.spans[:, 0]
            if method == "last":  # A first token shorter than the teacher's has read less than any teacher token.
                assert not (time.mask & ~text_rows).any()
                assert time.mask[-1]
            else:
                np.testing.assert_array_equal(time.mask, text_rows)
            np.testing.assert_allclose(time.dense().sum(1), time.mask.astype(float), atol=1e-12)


def test_identity_map_keeps_the_mask() -> None:
    mask = np.array([True, False, True])
    time = identity_map(3, mask)
    assert time.mask.tolist() == mask.tolist()
    assert torch.equal(time.apply(torch.ones(3, 1))[:, 0], torch.tensor([1.0, 0.0, 1.0]))


def _tokens(spans: np.ndarray[Any, Any], borders: tuple[int, int]) -> Tokens:
    """Prompt to the first border, rationale to the second, then answer, by each token's last byte."""
    count = len(spans)
    kinds = 1 + np.searchsorted(borders, spans[:, 1] - 1, side="right")
    segments = np.where(spans[:, 1] > spans[:, 0], kinds, 0).astype(np.uint8)
    return Tokens(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), spans, segments)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(RESAMPLERS)),
    st.integers(3, 60),
    st.lists(st.integers(0, 100), max_size=30),
    st.lists(st.integers(0, 100), max_size=30),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_segments_do_not_mix(method: str, size: int, one: list[int], two: list[int], cuts: tuple[int, int]) -> None:
    borders = (min(cuts), max(cuts))
    source, target = _tokens(_cut(size, one), borders), _tokens(_cut(size, two), borders)
    time = time_map(method, source, target)
    assert (source.segments[time.columns] == target.segments[time.rows]).all()
    np.testing.assert_allclose(time.dense().sum(1), time.mask.astype(float), atol=1e-12)
    for kind in (1, 2, 3):  # Each segment is mapped as if it were the whole text.
        own, other = (np.flatnonzero(tokens.segments == kind) for tokens in (source, target))
        alone = RESAMPLERS[method](source.spans[own], target.spans[other])
        np.testing.assert_array_equal(time.dense()[np.ix_(other, own)], alone.dense())
    if method == "last":
        assert (source.spans[time.columns, 1] <= target.spans[time.rows, 1]).all()
    mixed = time_map(method, source, target, across_segments=True)
    np.testing.assert_array_equal(mixed.dense(), RESAMPLERS[method](source.spans, target.spans).dense())


def test_a_token_that_crosses_a_border_is_no_target_of_the_other_segment() -> None:
    """The teacher reads bytes 2 to 6 as one token, the student begins its rationale at byte 4."""
    source, target = _tokens(_spans(2, 6, 8), (4, 8)), _tokens(_spans(2, 4, 5, 6, 8), (4, 8))
    assert source.segments.tolist() == [1, 2, 2]
    assert target.segments.tolist() == [1, 1, 2, 2, 2]
    assert time_map("last", source, target).dense().argmax(1).tolist() == [0, 0, 0, 1, 2]
    assert time_map("last", source, target).mask.tolist() == [True, True, False, True, True]
    assert time_map("last", source, target, across_segments=True).mask.all()


def test_coverage_by_hand() -> None:
    source, target = _tokens(_spans(2, 6, 8), (4, 8)), _tokens(_spans(2, 4, 5, 6, 8), (4, 8))
    met = coverage(time_map("last", source, target), source, target)
    assert met.tolist() == [[0, 0, 0], [2, 2, 1], [3, 2, 2], [0, 0, 0]]


def test_a_text_without_text_tokens_has_no_targets() -> None:
    nothing, some = _tokens(np.zeros((2, 2), np.int32), (1, 1)), _tokens(_equal_spans(3), (1, 2))
    assert not time_map("mean", nothing, some).mask.any()
    assert not time_map("mean", some, nothing).mask.any()
    assert coverage(time_map("mean", some, nothing), some, nothing).sum() == 0
