"""The real engine against Hugging Face on the same tokens, in every case of scheduling that there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from fixtures.models import ARCHITECTURES, save_model
from fixtures.tokenizers import byte_level_tokenizer

pytest.importorskip("vllm")

from kava.errors import CaptureError, RecipeError, UnsupportedModelError
from kava.extract import Captured, Tokens
from kava.extract.generate import GenerateSettings
from kava.extract.hf import HFTeacher
from kava.extract.vllm.settings import EngineSettings
from kava.extract.vllm.teacher import VLLMTeacher
from kava.hub import find_model

pytestmark = pytest.mark.vllm

SMALL = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
BY_TRANSFORMERS = ["glm", "helium", "olmo2", "olmo3", "phi", "phi-qk-norm", "seed_oss", "smollm3", "starcoder2"]
"""What vLLM has no code of its own for: it runs that of transformers, in which kava does not find the rotation."""
NATIVE = sorted({*ARCHITECTURES, "cohere-qk-norm"} - {*BY_TRANSFORMERS})
LENGTHS = [1, 2, 31, 32, 33, 64, 100, 128, 129, 200, 255, 256, 70, 70, 5, 90, 160, 33]
"""Shorter and longer than a block, of one token, and as long as the model reads."""


def _shape(model_type: str) -> dict[str, Any]:
    """vLLM's CPU kernels know no head_dim below 32; it takes that of some from hidden_size."""
    shape: dict[str, Any] = {"head_dim": 32}
    if model_type in ("qwen2", "qwen2_moe", "qwen3_moe", "mixtral"):
        shape["hidden_size"] = 192
    if model_type == "cohere2":  # Its window is one token wider there.
        shape["sliding_window"] = 256
    return shape


def _tokens(ids: np.ndarray[Any, Any]) -> Tokens:
    count = len(ids)
    none = np.zeros((count, 2), np.int32)
    return Tokens(ids.astype(np.int32), np.arange(count, dtype=np.int32), none, np.zeros(count, np.uint8))


def _samples(lengths: list[int], *, shared: int = 40) -> list[Tokens]:
    """Random ids; every second sample begins with the same ones, and the last one repeats the first long one."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, 400, shared)
    made = []
    for number, length in enumerate(lengths):
        ids = generator.integers(3, 400, length)
        if number % 2:
            ids[: min(shared, length // 2)] = prefix[: min(shared, length // 2)]
        made.append(_tokens(ids))
    return [*made, made[-2]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny random models, made when asked for."""
    root = tmp_path_factory.mktemp("vllm")
    made: dict[str, Path] = {}

    def get(model_type: str, **shape: Any) -> Path:
        name = f"{model_type} {shape}"
        if name not in made:
            folder = root / str(len(made))
            made[name] = save_model(folder, model_type, byte_level_tokenizer(400), **{**_shape(model_type), **shape})
        return made[name]

    return get


def _teacher(path: Path, dtype: str = "float32", **options: Any) -> VLLMTeacher:
    settings = EngineSettings.model_validate({**SMALL, "max_num_batched_tokens": 64, **options})
    return VLLMTeacher(find_model(str(path)), dtype=dtype, output_dtype="float32", settings=settings)


def _worst(found: list[Captured], reference: HFTeacher, samples: list[Tokens]) -> float:
    """The largest relative RMS error of any sample's keys or values in any layer."""
    assert sorted(c.index for c in found) == list(range(len(samples)))
    worst = 0.0
    for captured in found:
        (expected,) = reference.capture([samples[captured.index]])
        for got, right in ((captured.keys, expected.keys), (captured.values, expected.values)):
            assert got.shape == right.shape
            right = right.float()
            error = (got - right).square().mean((0, 2, 3)).sqrt() / right.square().mean((0, 2, 3)).sqrt()
            worst = max(worst, error.max().item())
    return worst


def _check(path: Path, samples: list[Tokens] | None = None, limit: float = 1e-5, **options: Any) -> VLLMTeacher:
    samples = samples or _samples(LENGTHS)
    with _teacher(path, **options) as teacher:
        found = list(teacher.capture(samples))
        again = {c.index: c for c in teacher.capture(samples)}
    reference = HFTeacher.load(find_model(str(path)), dtype="float32")
    assert _worst(found, reference, samples) < limit
    assert all(torch.equal(c.keys, again[c.index].keys) for c in found) or not options.get("deterministic", True)
    return teacher


@pytest.mark.parametrize("model_type", NATIVE)
def test_architectures_in_float32(models: Any, model_type: str) -> None:
    """Chunked prefill, several prompts per step, shared prefixes, sliding windows of 8 tokens."""
    _check(models(model_type))


@pytest.mark.parametrize("model_type", ["olmo2", "smollm3"])
def test_architectures_that_vllm_runs_by_transformers_are_refused(models: Any, model_type: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"{model_type} under vLLM: .*runs that of transformers \(Transformers"
    ):
        _teacher(models(model_type))


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        (
            "llama",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        ),
        ("phi3", {"rope_type": "longrope", "short_factor": [1 + i / 9 for i in range(16)], "long_factor": [9.0] * 16}),
    ],
    ids=["linear", "yarn", "longrope"],
)
def test_architectures_with_scaled_rotation(models: Any, model_type: str, extra: dict[str, Any]) -> None:
    original = {"original_max_position_embeddings": 257} if model_type == "phi3" else {}
    longer = {"max_position_embeddings": 512} if model_type == "phi3" else {}
    _check(models(model_type, rope_parameters={**extra, "rope_theta": 1e4}, **original, **longer))


def test_architectures_whose_table_is_another_under_vllm_are_refused(models: Any) -> None:
    """vLLM does not read LongRoPE's factor of attention."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [9.0] * 16, "attention_factor": 1.5}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    path = models("phi3", rope_parameters=longrope, original_max_position_embeddings=128)
    with pytest.raises(
        UnsupportedModelError, match=r"Phi3LongRoPE.* has another table: at position 0 it is .* off that"
    ):
        _teacher(path)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 32},
        {"block_size": 64, "max_num_batched_tokens": 100},
        {"max_num_batched_tokens": 2048, "max_num_seqs": 3},
        {"enable_prefix_caching": False},
        {"enforce_eager": False},
        {"handover_bytes": 16 << 20, "deterministic": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_engine_options_change_nothing(models: Any, options: dict[str, Any]) -> None:
    _check(models("llama"), **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"tensor_parallel_size": 2}),
        ({"kv_heads": 1}, {"tensor_parallel_size": 2}),
        ({}, {"pipeline_parallel_size": 2, "enforce_eager": False}),  # vLLM's CPU worker fails otherwise.
    ],
    ids=["heads over ranks", "fewer heads than ranks", "layers over ranks"],
)
def test_ranks_are_put_together(
    models: Any, shape: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    teacher = _check(models("llama", **shape), **options)
    assert len(set(teacher.worker_pids)) == 2
    assert not any(psutil.pid_exists(pid) for pid in teacher.worker_pids)


def test_bfloat16_is_as_exact_as_hugging_face_in_bfloat16(models: Any) -> None:
    path, samples = models("llama", scale=3.0), _samples(LENGTHS)
    source = find_model(str(path))
    reference = HFTeacher.load(source, dtype="float32")
    with HFTeacher.load(source, dtype="bfloat16") as half:
        own = _worst(
            [Captured(c.index, c.keys.float(), c.values.float()) for c in half.capture(samples)], reference, samples
        )
    with _teacher(path, dtype="bfloat16", enforce_eager=False) as teacher:
        found = _worst(list(teacher.capture(samples)), reference, samples)
    assert 1e-4 < found < 1.5 * own


def test_preempted_prompts_are_computed_again_and_stored_once(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of eight blocks grow side by side in a cache of eleven."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append((request.request_id, request.num_computed_tokens))
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    engine_args = {"num_gpu_blocks_override": 12, "long_prefill_token_threshold": 16}
    _check(models("llama"), _samples([250, 255, 240, 255, 100]), block_size=32, engine_args=engine_args)
    assert any(computed > 0 for _, computed in preempted), "nothing was preempted in the middle of its prompt"


def test_rows_that_the_engine_dropped_fail_loudly(models: Any) -> None:
    """A prefix from the cache of a model with sliding windows comes without the blocks behind the window."""
    samples = _samples([255, 255, 255, 255], shared=120)
    with (
        _teacher(models("mistral"), enable_prefix_caching=True, block_size=32) as teacher,
        pytest.raises(CaptureError, match="dropped rows behind a sliding window; set enable_prefix_caching: false"),
    ):
        list(teacher.capture(samples))


def test_other_tokens_than_were_given_fail_loudly(models: Any) -> None:
    with _teacher(models("llama")) as teacher:
        generate = teacher._llm.generate

        def other(prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
            changed = [dict(p) for p in prompts]
            changed[1]["prompt_token_ids"] = changed[1]["prompt_token_ids"][::-1]
            return generate(changed, *args, **kwargs)

        teacher._llm.generate = other
        with pytest.raises(CaptureError, match="prompt 1: the engine computed other tokens than it was given"):
            list(teacher.capture(_samples([5, 6, 7])))


def test_leaving_early_stops_the_engine(models: Any) -> None:
    before = psutil.Process().children(recursive=True)
    teacher = _teacher(models("llama"), deterministic=False, handover_bytes=16 << 20)
    started = [p for p in psutil.Process().children(recursive=True) if p not in before]
    engine = [p for p in started if "resource_tracker" not in " ".join(p.cmdline())]
    assert engine
    for _ in teacher.capture(_samples(LENGTHS * 20)):
        break
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert not alive


def test_it_writes_what_hugging_face_writes(models: Any) -> None:
    path = models("llama", scale=3.0)
    prompts = [[5, 6, 7], [9], list(range(20, 60))]
    how = GenerateSettings(max_new_tokens=20)
    with HFTeacher.load(find_model(str(path)), dtype="float32") as reference:
        expected = reference.generate(prompts, how, stop_ids=[0], numbers=[0, 1, 2])
        stop = expected[0][5]
        stopped = reference.generate(prompts, how, stop_ids=[stop], numbers=[0, 1, 2])
    assert len(stopped[0]) <= 5
    settings = EngineSettings.model_validate(SMALL)
    with VLLMTeacher(
        find_model(str(path)), dtype="float32", output_dtype="float32", settings=settings, decoding=True
    ) as teacher:
        assert teacher.generate(prompts, how, stop_ids=[0], numbers=[0, 1, 2]) == expected
        assert teacher.generate(prompts, how, stop_ids=[stop], numbers=[0, 1, 2]) == stopped
        sampled = GenerateSettings(max_new_tokens=20, temperature=1.0, seed=1)
        first, second = (teacher.generate(prompts, sampled, stop_ids=[0], numbers=[0, 1, 2]) for _ in range(2))
        assert first == second != expected


def test_unknown_engine_arguments_and_settings_that_do_not_work(models: Any) -> None:
    with pytest.raises(RecipeError, match="vLLM has no argument 'swap_spaces'"):
        _teacher(models("llama"), engine_args={"swap_spaces": 3})
    with pytest.raises(RecipeError, match="vLLM does not start with these engine settings: "):
        _teacher(models("llama"), block_size=33)


def test_an_engine_of_another_shape_than_the_config_is_refused(models: Any) -> None:
    """vLLM's Qwen2 takes head_dim from hidden_size, transformers' from the config: 32 here, 8 there."""
    with pytest.raises(UnsupportedModelError, match=r"qwen2 under vLLM: its cache cannot be written: .*head_dim"):
        _teacher(models("qwen2", hidden_size=48))


def test_positions_that_vllm_cannot_compute_are_refused(models: Any) -> None:
    tokens = _tokens(np.arange(5) + 7)
    shifted = Tokens(tokens.input_ids, tokens.positions + 1, tokens.spans, tokens.segments)
    with _teacher(models("llama")) as teacher, pytest.raises(UnsupportedModelError, match=r"positions 0, 1, ... only"):
        list(teacher.capture([shifted]))


def _configs(**changes: Any) -> Iterator[Any]:
    from types import SimpleNamespace as Space

    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cache = Space(cache_dtype=changes.get("cache_dtype", "auto"))
    parallel = Space(decode_context_parallel_size=changes.get("dcp", 1), prefill_context_parallel_size=1)
    yield Space(cache_config=cache, parallel_config=parallel, speculative_config=changes.get("speculative"))
    groups = [Space(layer_names=["layers.0"], kv_cache_spec=changes.get("spec", spec))] * changes.get("groups", 1)
    yield Space(kv_cache_groups=groups)


def test_what_cannot_be_captured_is_refused_by_name() -> None:
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    from kava.extract.vllm.compat import refuse_unsupported

    refuse_unsupported(*_configs())
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    state = MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,))
    for changes, message in (
        ({"spec": latent}, r"layer layers.0 keeps a MLAAttentionSpec"),
        ({"spec": state}, r"layer layers.0 keeps a MambaSpec"),
        ({"cache_dtype": "fp8"}, r"a KV cache of dtype fp8"),
        ({"dcp": 2}, r"decode_context_parallel_size spreads the tokens"),
        ({"groups": 2}, r"2 groups of caches"),
        ({"speculative": object()}, r"speculative decoding"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            refuse_unsupported(*_configs(**changes))
