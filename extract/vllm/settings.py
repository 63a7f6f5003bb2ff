"""Options of the engine, as the recipe gives them."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

OWNED: Final = {
    "model": "teachers.NAME.model",
    "tokenizer": "teachers.NAME.model",
    "revision": "teachers.NAME.revision",
    "tokenizer_revision": "teachers.NAME.revision",
    "dtype": "teachers.NAME.dtype",
    "trust_remote_code": "teachers.NAME.trust_remote_code",
    "skip_tokenizer_init": "kava hands over token ids",
    "kv_transfer_config": "kava's connector goes there",
    "worker_extension_cls": "kava's worker goes there",
    "kv_cache_dtype": "a quantised cache does not hold what the model computed",
    "speculative_config": "its layers are not the teacher's",
    "decode_context_parallel_size": "it spreads the tokens of a prompt over ranks",
    "prefill_context_parallel_size": "it spreads the tokens of a prompt over ranks",
    "data_parallel_size": "run one capture per device instead",
}
"""Engine arguments that a recipe cannot give, and what is there instead."""


class EngineSettings(BaseModel):
    """How vLLM runs this teacher. Nothing here determines what is captured, except `quantization`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share the heads of every layer."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the layers."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the device's memory for weights and cache (of the machine's memory on CPU); vLLM's default if None."""
    kv_cache_memory_bytes: PositiveInt | None = None
    """Size of the paged cache, instead of what `gpu_memory_utilization` leaves."""
    max_model_len: PositiveInt | None = None
    """The longest prompt, in tokens; the model's own if None."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens in one step; `extract.batch_tokens` if None."""
    max_num_seqs: PositiveInt = 256
    """Prompts in one step."""
    block_size: PositiveInt | None = None
    """Tokens in one block of the paged cache; vLLM's default if None."""
    enable_prefix_caching: bool | None = None
    """Compute prefixes that samples of one part share only once; on, but for models with sliding windows."""
    enforce_eager: bool = False
    """No compilation: starts a minute earlier and computes a little slower. CUDA graphs, which only help decoding, are
    never made."""
    quantization: str | None = None
    """Of the weights. It changes the numbers, so it is part of the store's content."""
    deterministic: bool = True
    """Schedule in our own process, so that a rerun forms the same batches; off, scheduling runs beside it."""
    handover_bytes: Annotated[int, Field(ge=16 << 20)] = 256 << 20
    """Memory through which each worker hands rows over; also the bound on copies under way on its device."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any other argument of vLLM's `EngineArgs`."""

    @field_validator("engine_args")
    @classmethod
    def _not_owned(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in OWNED:
                raise ValueError(f"{name!r} cannot be given here: {OWNED[name]}")
            if name in cls.model_fields:
                raise ValueError(f"{name!r} stands one level up, in engine.{name}")
        return given
