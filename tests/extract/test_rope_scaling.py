"""Every rope_type against the model's own cache: tables, caches turned back, and batches that must change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.models import UNROTATED, save_model, tiny_config, tiny_model
from fixtures.tokenizers import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kava.errors import AlignmentError, UnsupportedModelError
from kava.extract import Tokens
from kava.extract.generate import GenerateSettings
from kava.extract.hf import HFTeacher
from kava.extract.rope import RotaryTable, frequency_class, max_positions, rotary_tables, unrotate_cache
from kava.extract.vllm.limits import max_prompt
from kava.extract.vllm.settings import EngineSettings
from kava.hub import config_geometry, find_model, load_config
from kava.tap import KVTap, decoder

THETA = {"rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **THETA}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.6 * i for i in range(8)],
    **THETA,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    **THETA,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn with a factor of attention": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "yarn not truncated": ("qwen3", {"rope_parameters": {**YARN, "truncate": False}}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "proportional": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, **THETA}},
    ),
    "partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}),
    "partial and interleaved": ("glm4", {}),
    "partial and dynamic": (
        "stablelm",
        {"rope_parameters": {**DYNAMIC, "partial_rotary_factor": 0.5}, "max_position_embeddings": 32},
    ),
    "interleaved and linear": ("cohere", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}),
    "by kind of layer": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", **THETA},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
    ),
    "dynamic in one kind of layer": (
        "gemma3_text",
        {
            "rope_parameters": {"sliding_attention": {"rope_type": "default", **THETA}, "full_attention": DYNAMIC},
            "max_position_embeddings": 32,
        },
    ),
    "not in every layer": ("smollm3", {"rope_parameters": {**YARN, "attention_factor": 1.2}}),
    "not in full attention": ("cohere2", {}),
}


def _model(name: str) -> Any:
    model_type, extra = SCALINGS[name]
    return tiny_model(model_type, **extra)


def _config(name: str) -> Any:
    model_type, extra = SCALINGS[name]
    return tiny_config(model_type, **extra)


def _ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed))


def _cached(model: Any, forwards: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-RoPE keys as the tap sees them, and the model's own cache, over these forward passes: `[t, l, h, d]`."""
    cache, tapped = DynamicCache(), []
    with torch.no_grad(), KVTap(model) as tap:
        for ids in torch.split(_ids(sum(forwards)), forwards, dim=1):
            decoder(model)(input_ids=ids, past_key_values=cache, use_cache=True)
            tapped.append(tap.stack()[0][0])
    own = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers], dim=1)
    return torch.cat(tapped), own


@pytest.mark.parametrize("length", [20, 32, 33, 50])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotated_keys_are_the_models_cache_and_turned_back_are_its_keys(name: str, length: int) -> None:
    model = _model(name)
    keys, own = _cached(model, [length])
    positions = torch.arange(length)
    for layer, table in enumerate(rotary_tables(model.config, positions)):
        assert table.cos.dtype == table.sin.dtype == torch.float32
        torch.testing.assert_close(table.rotate(keys[:, layer]), own[:, layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(table.unrotate(own[:, layer]), keys[:, layer], rtol=1e-5, atol=1e-5)
        assert (table.rotary_dim == 0) == (layer in UNROTATED.get(model.config.model_type, ()))
    torch.testing.assert_close(unrotate_cache(model.config, own, positions), keys, rtol=1e-5, atol=1e-5)


def test_scaled_tables_are_what_their_formulas_say() -> None:
    """In float64 and plain numbers, for a head of 16."""
    positions, at = torch.arange(50), 49
    plain = [10000.0 ** (-i / 8) for i in range(8)]
    grown = 10000.0 * (4.0 * 50 / 32 - 3.0) ** (16 / 14)
    ratio = (1 + np.log(256 / 32) / np.log(32)) ** 0.5
    for name, frequencies, scale in (
        ("default", plain, 1.0),
        ("linear", [f / 4 for f in plain], 1.0),
        ("dynamic", [grown ** (-i / 8) for i in range(8)], 1.0),
        ("longrope", [f / (1.5 + 0.6 * i) for i, f in enumerate(plain)], ratio),
        ("proportional", plain[:4] + [0.0] * 4, 1.0),
        ("partial", [10000.0 ** (-i / 4) for i in range(4)], 1.0),
    ):
        (table, *_) = rotary_tables(_config(name), positions)
        np.testing.assert_allclose(table.cos[at], scale * np.cos(at * np.array(frequencies)), atol=1e-5)
        np.testing.assert_allclose(table.sin[at], scale * np.sin(at * np.array(frequencies)), atol=1e-5)
    (table, *_) = rotary_tables(_config("yarn"), positions)
    norm = (table.cos.square() + table.sin.square()).sqrt()
    np.testing.assert_allclose(norm, 0.1 * np.log(4.0) + 1, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(SCALINGS)), st.lists(st.integers(0, 120), min_size=1, max_size=12), st.randoms())
def test_turning_a_cache_back_is_the_inverse_at_any_positions(name: str, places: list[int], random: Any) -> None:
    config, positions = _config(name), torch.tensor(places)
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    keys = torch.randn(len(places), 4, 2, 16, generator=generator)
    tables = rotary_tables(config, positions)
    rotated = torch.stack([table.rotate(keys[:, layer]) for layer, table in enumerate(tables)], dim=1)
    torch.testing.assert_close(unrotate_cache(config, rotated, positions), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope", "dynamic in one kind of layer"])
def test_a_cache_that_grew_past_a_change_of_frequencies_is_refused(name: str) -> None:
    model, forwards = _model(name), [30, *[1] * 10]
    keys, own = _cached(model, forwards)
    positions = torch.arange(40)
    with pytest.raises(
        UnsupportedModelError, match=r"reached 30 and 40 positions, rope_type .*changed its frequencies"
    ):
        unrotate_cache(model.config, own, positions, forwards=forwards)
    one_table = unrotate_cache(model.config, own, positions)  # As if it were one prefill: wrong, so rightly refused.
    assert (one_table - keys)[:30].norm() / keys[:30].norm() > 0.1


@pytest.mark.parametrize(
    ("name", "forwards"),
    [
        ("default", [30, *[1] * 10]),
        ("yarn", [7, 13, 20]),
        ("dynamic", [20, 5, *[1] * 7]),
        ("longrope", [20, 12]),
        ("longrope", [33, 2, 1]),
        ("not in full attention", [30, 10]),
    ],
)
def test_a_cache_of_several_passes_with_equal_frequencies_is_turned_back(name: str, forwards: list[int]) -> None:
    model = _model(name)
    keys, own = _cached(model, forwards)
    found = unrotate_cache(model.config, own, torch.arange(sum(forwards)), forwards=forwards)
    torch.testing.assert_close(found, keys, rtol=1e-5, atol=1e-5)


def test_half_precision_is_turned_back_in_float32() -> None:
    keys, own = _cached(_model("yarn"), [40])
    found = unrotate_cache(_config("yarn"), own.bfloat16(), torch.arange(40))
    assert found.dtype == torch.float32
    assert (found - keys).norm() / keys.norm() < 2**-8


@pytest.mark.parametrize(
    ("shape", "positions", "forwards", "message"),
    [
        ((5, 4, 2, 16), [0, 1, 2, 3], None, r"keys must be \[t, l, h, d\] and positions \[t\], got .*5.* and \(4,\)"),
        ((5, 2, 16), [0, 1, 2, 3, 4], None, r"keys must be \[t, l, h, d\]"),
        ((5, 4, 2, 16), [0, 1, 2, -1, 4], None, r"positions must be \[t\] integers from 0 on.*the smallest -1"),
        ((3, 4, 2, 16), [0.0, 1.0, 2.0], None, r"positions must be .*got torch.float32"),
        ((0, 4, 2, 16), [], None, r"positions must be "),
        ((3, 4, 2, 16), [0, 1, 2], [2, 2], r"forward passes of \[2, 2\] tokens do not make up 3 keys"),
        ((3, 4, 2, 16), [0, 1, 2], [3, 0], r"forward passes of \[3, 0\]"),
        ((3, 5, 2, 16), [0, 1, 2], None, r"keys of 5 layers, the model has 4"),
    ],
)
def test_what_does_not_fit_is_refused(shape: Any, positions: Any, forwards: Any, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        unrotate_cache(_config("default"), torch.zeros(shape), torch.tensor(positions), forwards=forwards)


@pytest.mark.parametrize("name", SCALINGS)
def test_geometry_is_counted_without_weights_under_every_scaling(name: str) -> None:
    config = _config(name)
    stated = json.dumps(config.rope_parameters)
    assert config_geometry(config).shape == (4, 2, 16)
    assert json.dumps(config.rope_parameters) == stated


def test_unknown_architectures_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported"):
        rotary_tables(GPT2Config(), torch.arange(3))


def _tokens(length: int, number: int) -> Tokens:
    none = np.zeros((length, 2), np.int32)
    ids = _ids(length, seed=number)[0].numpy().astype(np.int32)
    return Tokens(ids, np.arange(length, dtype=np.int32), none, none[:, 0].astype(np.uint8))


SAMPLES = [_tokens(length, number) for number, length in enumerate([50, 20, 41, 41, 32, 5, 33, 50])]
BY_LENGTH = ["dynamic", "longrope", "partial and dynamic", "dynamic in one kind of layer"]


def _worst(found: list[Any], name: str, samples: list[Tokens]) -> float:
    """The largest error of any sample against a new model that sees it alone."""
    worst = 0.0
    for captured in found:
        (alone,) = HFTeacher(_model(name)).capture([samples[captured.index]])
        worst = max(worst, (captured.keys - alone.keys).abs().max().item())
    return worst


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_sample_does_not_depend_on_its_neighbours(
    name: str, padding_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = HFTeacher(_model(name), padding_side=padding_side)
    assert _worst(list(teacher.capture(SAMPLES)), name, SAMPLES) < 2e-5
    monkeypatch.setattr("kava.extract.hf.frequency_class", lambda config, length: 0)
    assert _worst(list(teacher.capture(SAMPLES)), name, SAMPLES) > 1e-2  # It would, if they were batched together.


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_sample_does_not_depend_on_the_pass_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [[SAMPLES[i] for i in order] for order in ([0, 1, 2, 4], [5, 0, 6, 3])]
    for samples in orders:
        teacher = HFTeacher(_model(name))
        found = [captured for tokens in samples for captured in teacher.capture([tokens])]
        for tokens, captured in zip(samples, found, strict=True):
            (alone,) = HFTeacher(_model(name)).capture([tokens])
            assert torch.equal(captured.keys, alone.keys)
    if "dynamic" in name:  # transformers itself keeps the frequencies of the longest pass.
        monkeypatch.setattr("kava.extract.hf.forget_longest_pass", lambda model: None)
        teacher = HFTeacher(_model(name))
        list(teacher.capture([SAMPLES[0]]))
        (kept,) = teacher.capture([SAMPLES[2]])
        (alone,) = HFTeacher(_model(name)).capture([SAMPLES[2]])
        assert (kept.keys - alone.keys).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_continuation_does_not_depend_on_its_neighbours(name: str) -> None:
    prompts = [t.input_ids.tolist() for t in SAMPLES[:6]] + [_ids(28, seed=9)[0].tolist()]
    how, numbers = GenerateSettings(max_new_tokens=8), list(range(len(prompts)))
    together = HFTeacher(_model(name)).generate(prompts, how, stop_ids=[0], numbers=numbers)
    for number, prompt in enumerate(prompts):
        (alone,) = HFTeacher(_model(name)).generate([prompt], how, stop_ids=[0], numbers=[number])
        assert together[number] == alone


def test_passes_of_equal_class_rotate_alike() -> None:
    for name in SCALINGS:
        config = _config(name)
        at = {length: rotary_tables(config, torch.arange(length)) for length in (31, 32, 33, 34)}
        for a, b in ((31, 32), (32, 33), (33, 34)):
            alike = all(torch.equal(x.cos[:31], y.cos[:31]) for x, y in zip(at[a], at[b], strict=True))
            assert alike == (frequency_class(config, a) == frequency_class(config, b)), (name, a, b)


def test_dynamic_scaling_reads_further_than_the_original_length() -> None:
    assert HFTeacher(_model("dynamic")).max_tokens == 128
    assert HFTeacher(_model("longrope")).max_tokens == 256


@pytest.mark.parametrize(
    ("rope_scaling", "stated", "limit"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}, 64, 256),
        ({"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}, 80, 256),
        ({"factor": 2.5, "original_max_position_embeddings": 64, "rope_type": "yarn"}, 160, 160),
        ({"factor": 4.0, "rope_type": "yarn"}, 64, 256),
        ({"factor": 8.0, "rope_type": "linear"}, 64, 64),
        (None, 64, 64),
    ],
    ids=["qwen2.5's card", "qwen3's card", "deepseek", "no original length", "linear", "plain"],
)
def test_yarn_reads_factor_times_the_original_length(
    tmp_path: Path, rope_scaling: dict[str, Any] | None, stated: int, limit: int
) -> None:
    folder = save_model(tmp_path / "model", "qwen2", byte_level_tokenizer(400), max_position_embeddings=stated)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": rope_scaling}
    (folder / "config.json").write_text(json.dumps(config))
    source = find_model(str(folder))
    assert max_positions(load_config(source)) == limit
    assert max_prompt(load_config(source), EngineSettings()) == limit
    assert HFTeacher.load(source, dtype="float32", device="cpu").max_tokens == limit


def test_tables_of_two_sources_are_told_apart() -> None:
    positions = torch.arange(200)
    plain, linear, yarn, partial = (
        rotary_tables(_config(n), positions)[0]
        for n in ("default", "linear", "yarn with a factor of attention", "partial")
    )
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)}
    rounded = RotaryTable(plain.cos.bfloat16().float(), plain.sin.bfloat16().float())
    assert plain.differs(RotaryTable(plain.cos, plain.sin), eps[torch.float32]) is None
    assert rounded.differs(plain, eps[torch.bfloat16]) is None
    assert "has another table: at position 1 " in str(rounded.differs(plain, eps[torch.float32]))
    assert "has another table: at position 1 " in str(linear.differs(plain, eps[torch.bfloat16]))
    assert "has another table: at position 0 it is 3.0e-01" in str(yarn.differs(plain, eps[torch.bfloat16]))
    assert partial.differs(plain, 1.0) == "turns 8 dimensions half and half, not 16 half and half like that"
    turned = RotaryTable(plain.cos, plain.sin, interleaved=True)
    assert turned.differs(plain, 1.0) == "turns 16 dimensions interleaved, not 16 half and half like that"
