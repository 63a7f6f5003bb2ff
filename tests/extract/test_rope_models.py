"""Rotary tables read from a config, against the model's own cache; queries of the tap against its attention."""

from __future__ import annotations

import pytest
import torch
from fixtures.models import ARCHITECTURES, OPTIONS, tiny_model
from transformers import DynamicCache

from kava.extract.rope import rotary_tables
from kava.tap import KVTap, decoder


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OPTIONS])
def test_tapped_keys_rotated_by_the_table_are_the_models_cache(model_type: str) -> None:
    model = tiny_model(model_type)
    positions = torch.arange(20)
    tables = rotary_tables(model.config, positions)
    assert len(tables) == 4
    ids = torch.randint(1, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), KVTap(model, queries=True) as tap:
        cache = decoder(model)(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    for layer, own in enumerate(cache.layers):
        rotated = own.keys[0].transpose(0, 1)
        torch.testing.assert_close(tables[layer].rotate(tap.keys[layer][0]), rotated, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tables[layer].unrotate(rotated), tap.keys[layer][0], rtol=1e-5, atol=1e-5)
        assert tap.queries[layer].shape == (1, 20, 6, 16)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OPTIONS])
def test_tapped_queries_give_the_models_own_attention(model_type: str) -> None:
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    positions = torch.arange(8)  # Within every sliding window.
    tables = rotary_tables(model.config, positions)
    ids = torch.randint(1, 96, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), KVTap(model, queries=True) as tap:
        attentions = decoder(model)(input_ids=ids, output_attentions=True).attentions
    for layer, own in enumerate(attentions):
        queries = tables[layer].rotate(tap.queries[layer][0])
        keys = tables[layer].rotate(tap.keys[layer][0]).repeat_interleave(3, dim=1)
        attention = decoder(model).layers[layer].self_attn
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * attention.scaling
        if cap := getattr(attention, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / cap) * cap
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(scores.softmax(-1), own[0], rtol=1e-4, atol=1e-5)
