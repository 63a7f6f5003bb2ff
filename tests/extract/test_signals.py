"""Signals of the forward pass against plain loops in float64 and the model's own loss, by architecture and padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.models import ARCHITECTURES, own_rotation, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import RecipeError, UnsupportedModelError
from kava.extract import Tokens
from kava.extract.hf import HFTeacher
from kava.extract.signals import answer_attention, signal_arrays
from kava.store import LOGITS, Segment
from kava.tap import KVTap, decoder

PROMPT, RATIONALE, ANSWER, NONE = Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER, Segment.NONE
SAMPLES = [
    [NONE, *[PROMPT] * 3, *[RATIONALE] * 9, *[ANSWER] * 4, NONE],  # Windows of 8 reach some of the rationale.
    [PROMPT] * 2 + [RATIONALE] * 3 + [PROMPT] * 12 + [ANSWER] * 2,  # And none of this one.
    [RATIONALE] * 2 + [ANSWER] * 3 + [RATIONALE] * 2 + [ANSWER],  # Two turns: the second rationale comes later.
    [PROMPT] * 3 + [ANSWER] * 4,
    [PROMPT] * 3 + [RATIONALE] * 4,
    [RATIONALE],
]


def _tokens(segments: list[Segment]) -> Tokens:
    length = len(segments)
    rng = np.random.default_rng(length)
    sizes = np.where(np.array(segments) == NONE, 0, rng.integers(1, 5, length))
    stops = np.cumsum(sizes)
    return Tokens(
        rng.integers(1, 96, length).astype(np.int32),
        np.arange(length, dtype=np.int32),
        np.stack([stops - sizes, stops], axis=1).astype(np.int32),
        np.array(segments, np.uint8),
    )


def _eager(model: Any, tokens: Tokens) -> tuple[KVTap, Any]:
    ids = torch.from_numpy(tokens.input_ids).long()[None]
    with torch.no_grad(), KVTap(model, queries=True) as tap:
        return tap, decoder(model)(input_ids=ids, output_attentions=True).attentions


def _importance_in_loops(model: Any, tokens: Tokens) -> np.ndarray[Any, Any]:
    """`[t, l, h]` float64. What the mask lets through is read off the model's own attention weights."""
    tap, attentions = _eager(model, tokens)
    layers, heads = len(attentions), tap.keys[0].shape[2]
    groups = tap.queries[0].shape[2] // heads
    answers, rationale = (np.flatnonzero(tokens.segments == kind) for kind in (ANSWER, RATIONALE))
    out = np.full((len(tokens), layers, heads), np.nan)
    if not len(answers) or not len(rationale):
        return out
    out[rationale] = 0
    for layer in range(layers):
        attention = decoder(model).layers[layer].self_attn
        queries = own_rotation(model, tap.queries[layer][0], layer).double().numpy()
        keys = own_rotation(model, tap.keys[layer][0], layer).double().numpy()
        for head in range(heads):
            seeing = 0
            for a in answers:
                logits = {}
                for r in rationale:
                    if float(attentions[layer][0, head * groups, a, r]) == 0:
                        continue
                    group = [float(queries[a, head * groups + g] @ keys[r, head]) for g in range(groups)]
                    group = [logit * attention.scaling for logit in group]
                    if cap := getattr(attention, "attn_logit_softcapping", None):
                        group = [cap * math.tanh(logit / cap) for logit in group]
                    logits[r] = max(group)
                if not logits:
                    continue
                seeing += 1
                total = sum(math.exp(logit - max(logits.values())) for logit in logits.values())
                for r, logit in logits.items():
                    out[r, layer, head] += math.exp(logit - max(logits.values())) / total
            out[rationale, layer, head] /= max(seeing, 1)
    return out


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_importance_is_that_of_the_models_own_logits(model_type: str, padding_side: Any) -> None:
    # Weights are small enough that no attention weight underflows to the zero by which the oracle knows the mask.
    model = tiny_model(model_type, scale=4.0)
    batch = [_tokens(segments) for segments in SAMPLES]
    teacher = HFTeacher(model, padding_side=padding_side, batch_tokens=60, importance=True)
    found = {captured.index: captured.extras["importance"] for captured in teacher.capture(batch)}
    model.set_attn_implementation("eager")
    for index, tokens in enumerate(batch):
        expected = _importance_in_loops(model, tokens)
        assert found[index].dtype == np.float32
        np.testing.assert_allclose(found[index], expected, rtol=1e-4, atol=1e-6)
    sums = np.nansum(found[0], axis=0)
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    assert np.nanstd(found[0][:, 1]) > 1e-3, "the weights are not uniform, so that the check can fail"


def test_a_window_that_ends_before_the_rationale_leaves_zero() -> None:
    teacher = HFTeacher(tiny_model("gemma3_text"), importance=True)
    ((captured,)) = teacher.capture([_tokens(SAMPLES[1])])
    weights = captured.extras["importance"][2:5]
    np.testing.assert_allclose(weights.sum(0), np.array([0, 1, 0, 1])[:, None].repeat(2, 1), rtol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_confidence_is_the_models_own_loss(model_type: str, padding_side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kava.extract.signals.BLOCK_BYTES", 4 * 96 * 3)  # Three rows of logits at a time.
    # A cap that the small logits of a tiny model reach.
    model = tiny_model(model_type, **({"final_logit_softcapping": 0.5} if model_type == "gemma2" else {}))
    batch = [_tokens(segments) for segments in SAMPLES]
    teacher = HFTeacher(model, padding_side=padding_side, batch_tokens=60, confidence=True)
    for captured in teacher.capture(batch):
        tokens, extras = batch[captured.index], captured.extras
        assert set(extras) == set(signal_arrays(teacher.geometry, importance=False, confidence=True))
        wanted = (tokens.spans[:, 1] > tokens.spans[:, 0]) & (np.arange(len(tokens)) > 0)
        assert extras["predicted_tokens"] == wanted.sum()
        assert extras["text_bytes"] == (tokens.spans[wanted, 1] - tokens.spans[wanted, 0]).sum()
        if not wanted.any():
            assert extras["nats"] == 0
            assert np.isnan(extras["entropy"])
            continue
        ids = torch.from_numpy(tokens.input_ids).long()[None]
        labels = torch.where(torch.from_numpy(wanted), ids, -100)
        with torch.no_grad():
            own = model(input_ids=ids, labels=labels)
        np.testing.assert_allclose(extras["nats"], float(own.loss) * wanted.sum(), rtol=1e-5)
        logs = own.logits[0, np.flatnonzero(wanted) - 1].double().log_softmax(-1)
        np.testing.assert_allclose(extras["entropy"], float(-(logs.exp() * logs).sum(-1).mean()), rtol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_are_the_models_own(model_type: str, padding_side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every token, the last one too; some of the vocabulary, and all of it."""
    monkeypatch.setattr("kava.extract.signals.BLOCK_BYTES", 4 * 96 * 3)  # Three rows of logits at a time.
    model = tiny_model(model_type, **({"final_logit_softcapping": 0.5} if model_type == "gemma2" else {}))
    batch = [_tokens(segments) for segments in SAMPLES]
    for k in (7, 96):
        teacher = HFTeacher(model, padding_side=padding_side, batch_tokens=60, logits=k)
        for captured in teacher.capture(batch):
            tokens, extras = batch[captured.index], captured.extras
            assert set(extras) == set(signal_arrays(teacher.geometry, importance=False, confidence=False, logits=k))
            with torch.no_grad():
                own = model(input_ids=torch.from_numpy(tokens.input_ids).long()[None]).logits[0]
            logs = own.double().log_softmax(-1).numpy()
            ids, found, tail = (extras[name] for name in LOGITS)
            assert (ids.dtype, found.dtype, tail.dtype) == (np.int32, np.float32, np.float32)
            np.testing.assert_allclose(found, np.take_along_axis(logs, ids.astype(int), 1), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found, -np.sort(-logs, axis=1)[:, :k], rtol=1e-4, atol=1e-5)
            for row, one in enumerate(ids):
                rest = [math.exp(p) for i, p in enumerate(logs[row]) if i not in one]
                assert len(rest) == 96 - k
                np.testing.assert_allclose(math.exp(tail[row]), math.fsum(rest), rtol=1e-4)
            assert np.isneginf(tail).all() == (k == 96)


def test_more_logits_than_there_are() -> None:
    with pytest.raises(RecipeError, match=r"extract.logits: 97 is more than the 96 that the model has"):
        HFTeacher(tiny_model("llama"), logits=97)


def test_a_head_that_does_more_is_refused() -> None:
    model = tiny_model("llama")
    own = model.forward

    def doubled(*arguments: Any, **named: Any) -> Any:
        found = own(*arguments, **named)
        found.logits = found.logits * 2
        return found

    model.forward = doubled
    for wanted in ({"confidence": True}, {"logits": 4}):
        with pytest.raises(UnsupportedModelError, match="does something to its logits"):
            HFTeacher(model, **wanted)
    HFTeacher(model)


def test_nothing_is_computed_that_was_not_asked_for() -> None:
    (captured,) = HFTeacher(tiny_model("llama")).capture([_tokens(SAMPLES[0])])
    assert captured.extras == {}


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([None, 2.0]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_blocks_change_nothing(shape: tuple[int, int, int, int], softcap: float | None, rows: int, seed: int) -> None:
    answers, rationale, heads, groups = shape
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(answers, heads * groups, 4, generator=generator)
    keys = torch.randn(rationale, heads, 4, generator=generator)
    visible = torch.rand(answers, rationale, generator=generator) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        whole = answer_attention(queries, keys, visible, scale=0.5, softcap=softcap)
        patch.setattr("kava.extract.signals.BLOCK_BYTES", rows * 4 * heads * groups * rationale)
        blocks = answer_attention(queries, keys, visible, scale=0.5, softcap=softcap)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(whole.sum(0), torch.full((heads,), float(visible.any())))
