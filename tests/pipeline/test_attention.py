"""The replayed attention against the model's own, and what its cosine says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures.models import ARCHITECTURES, tiny_model

from kava.errors import UnsupportedModelError
from kava.pipeline.report.attention import AttentionReplay
from kava.tap import ATTENTION_LAYOUTS, decoder

TOKENS = 20  # Beyond the sliding windows of 8.


def _model(model_type: str, **shape: int) -> Any:
    model = tiny_model(model_type, **shape)
    if implementation := ATTENTION_LAYOUTS[model_type].attn_implementation:
        model.set_attn_implementation(implementation)
    return model


def _replay(model: Any) -> AttentionReplay:
    ids = torch.randint(1, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return AttentionReplay(model, ids, torch.arange(TOKENS))


def _stacked(replay: AttentionReplay) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack(replay.keys, dim=1), torch.stack(replay.values, dim=1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_own_keys_and_values_give_the_models_own_outputs(model_type: str) -> None:
    model = _model(model_type)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.get_submodule("dense" if model_type == "phi" else "o_proj").register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0])
        )
        for layer in decoder(model).layers
    ]
    replay = _replay(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    for layer, own in enumerate(seen):
        made = replay.output(layer, replay.keys[layer], replay.values[layer])
        torch.testing.assert_close(made.flatten(1), own, rtol=1e-3, atol=1e-4)
    cosines = replay.cosines(*_stacked(replay), torch.arange(TOKENS) % 3 > 0)
    torch.testing.assert_close(cosines, torch.ones(4))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_cosine_by_plain_loops(model_type: str) -> None:
    """Every score, share and cosine by itself, in float64, with Python's own loops over queries, keys and heads."""
    model = _model(model_type, layers=2)
    replay = _replay(model)
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(TOKENS, 2, 2, 16, generator=generator) for _ in range(2))
    mask = torch.arange(TOKENS) % 4 != 1
    found = replay.cosines(keys, values, mask)
    for layer in range(2):
        attention, table = decoder(model).layers[layer].self_attn, replay._tables[layer]
        cap = getattr(attention, "attn_logit_softcapping", None)
        window = getattr(attention, "sliding_window", None) or TOKENS
        mixed = [
            torch.where(mask[:, None, None], new[:, layer], own)
            for new, own in ((keys, replay.keys[layer]), (values, replay.values[layer]))
        ]
        queries = table.rotate(replay.queries[layer]).double()
        cosines = []
        for q in range(TOKENS):
            for head in range(6):
                read = []
                for k, v in ((replay.keys[layer], replay.values[layer]), mixed):
                    rotated = table.rotate(k).double()
                    reach = range(max(0, q - window + 1), q + 1)
                    scores = [float(queries[q, head] @ rotated[j, head // 3]) * attention.scaling for j in reach]
                    if cap:
                        scores = [float(torch.tanh(torch.tensor(s / cap, dtype=torch.float64))) * cap for s in scores]
                    weights = [float(torch.exp(torch.tensor(s - max(scores), dtype=torch.float64))) for s in scores]
                    total = sum(weights)
                    shares = torch.tensor([w / total for w in weights], dtype=torch.float64)
                    read.append((shares[:, None] * v[list(reach), head // 3].double()).sum(0))
                if mask[q]:
                    one, two = read
                    cosines.append(float(one @ two / (one.norm() * two.norm())))
        assert float(found[layer]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert 0.02 < abs(float(found[layer])) < 0.98, "a case that can fail"


def test_tokens_without_a_target_keep_the_students_own() -> None:
    replay = _replay(_model("llama"))
    keys, values = _stacked(replay)
    mask = torch.arange(TOKENS) < 15
    spoiled = torch.where(mask[:, None, None, None], keys, 1e3), torch.where(mask[:, None, None, None], values, 1e3)
    torch.testing.assert_close(replay.cosines(*spoiled, mask), torch.ones(4))
    torch.testing.assert_close(replay.cosines(keys, 5 * values, torch.ones(TOKENS).bool()), torch.ones(4))
    assert (replay.cosines(keys, -values, torch.ones(TOKENS).bool()) < -0.99).all()


def test_an_attention_that_is_not_replayed_is_refused() -> None:
    model = _model("llama")
    model.model.layers[2].self_attn.scaling *= 1.1
    _replay(model)
    model.model.layers[2].self_attn.attn_logit_softcapping = 0.1  # Not a part of llama: the model ignores it.
    with pytest.raises(UnsupportedModelError, match="layer 2 does not attend as kava computes it"):
        _replay(model)
