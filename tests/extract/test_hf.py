"""The HF teacher against the model's own cache: re-rotated keys and values must be what the model itself computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fixtures.models import ARCHITECTURES, OPTIONS, own_rotation, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config

from kava.errors import AlignmentError, UnsupportedModelError
from kava.extract import Tokens
from kava.extract.hf import HFTeacher
from kava.hub import config_geometry
from kava.store import KVGeometry
from kava.tap import KVTap, decoder, probe_geometry

LENGTHS = [11, 3, 24, 1, 17]


def _tokens(length: int, vocab: int = 96) -> Tokens:
    ids = np.random.default_rng(length).integers(1, vocab, length).astype(np.int32)
    none = np.zeros((length, 2), np.int32)
    return Tokens(ids, np.arange(length, dtype=np.int32), none, none[:, 0].astype(np.uint8))


def _own_cache(model: Any, tokens: Tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (rotated) and values of one sequence as the model caches them: per layer `[t, h, d]`."""
    ids = torch.from_numpy(tokens.input_ids).long()[None]
    with torch.no_grad():
        cache = decoder(model)(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OPTIONS])
def test_captured_equals_the_models_own_cache_in_float32(model_type: str, padding_side: Any) -> None:
    model = tiny_model(model_type)
    teacher = HFTeacher(model, padding_side=padding_side, batch_tokens=40)
    batch = [_tokens(n) for n in LENGTHS]
    found = {c.index: c for c in teacher.capture(batch)}
    assert sorted(found) == list(range(len(batch)))
    for index, tokens in enumerate(batch):
        keys, values = found[index].keys, found[index].values
        assert keys.shape == (len(tokens), *teacher.geometry.shape)
        for layer, (own_keys, own_values) in enumerate(_own_cache(model, tokens)):
            torch.testing.assert_close(own_rotation(model, keys[:, layer], layer), own_keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values[:, layer], own_values, rtol=1e-5, atol=1e-5)
        if len(tokens) > 1:  # The check can fail: without rotation the keys are others.
            assert (keys[1:, 0] - _own_cache(model, tokens)[0][0][1:]).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OPTIONS])
def test_captured_equals_the_models_own_cache_in_bfloat16(model_type: str) -> None:
    model = tiny_model(model_type, scale=4.0).to(torch.bfloat16)
    teacher = HFTeacher(model)
    tokens = _tokens(24)
    (captured,) = teacher.capture([tokens])
    keys, values = captured.keys, captured.values
    assert keys.dtype == torch.bfloat16
    for layer, (own_keys, own_values) in enumerate(_own_cache(model, tokens)):
        assert torch.equal(values[:, layer], own_values)
        rotated = own_rotation(model, keys[:, layer].float(), layer)
        # One rounding of the table, one of each product and of the sum: a few units of 2^-8.
        error = (rotated - own_keys.float()).norm() / own_keys.float().norm()
        assert error < 6e-3


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (4, 4)])
def test_geometry_is_counted_without_weights(model_type: str, heads: int, kv_heads: int) -> None:
    geometry = config_geometry(tiny_config(model_type, heads=heads, kv_heads=kv_heads, layers=3))
    assert geometry == KVGeometry(num_layers=3, num_key_value_heads=kv_heads, head_dim=16)


def test_twelve_query_heads_are_not_twelve_kv_heads() -> None:
    geometry = probe_geometry(tiny_model("qwen2", heads=12, kv_heads=2, layers=2))
    assert geometry == KVGeometry(num_layers=2, num_key_value_heads=2, head_dim=16)


def test_a_config_that_lies_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_key_value_heads = 6
    with pytest.raises(AlignmentError, match=r"config\.num_key_value_heads is 6, its cache has 2"):
        probe_geometry(model)


def test_unknown_architectures_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported.*Supported: llama"):
        HFTeacher(model)


def test_the_tap_carries_gradient_and_removes_its_hooks() -> None:
    model = tiny_model("qwen3")
    with KVTap(model, layers=[1, 3]) as tap:
        decoder(model)(input_ids=torch.ones((2, 5), dtype=torch.int64))
    keys, values = tap.stack()
    assert keys.shape == values.shape == (2, 5, 2, 2, 16)
    (keys.square().sum() + values.square().sum()).backward()  # type: ignore[no-untyped-call]
    for layer in (0, 1, 2, 3):
        weight = model.model.layers[layer].self_attn.k_proj.weight.grad
        assert (weight is not None and bool(weight.any())) == (layer != 2) or layer == 2
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="boom"), KVTap(model):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in model.modules())


def test_a_batch_changes_nothing_but_rounding() -> None:
    teacher = HFTeacher(tiny_model("llama"))
    batch = [_tokens(n) for n in LENGTHS]
    for captured in teacher.capture(batch):
        (alone,) = teacher.capture([batch[captured.index]])
        torch.testing.assert_close(captured.keys, alone.keys, rtol=1e-5, atol=1e-5)
