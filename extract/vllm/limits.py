"""What vLLM is given, so that it computes and samples what transformers does.

Models and prompts for which it computes other numbers are refused by name before the engine starts. The worker also
compares the rotary table of the running engine with that of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError, UnsupportedModelError
from ..rope import MODEL_LIMIT, max_positions, rope_parameters
from .settings import EngineSettings

if TYPE_CHECKING:
    from ..generate import GenerateSettings


def max_prompt(config: Any, settings: EngineSettings) -> int:
    """How many tokens a prompt may have, so that vLLM computes what transformers does.

    Raises:
        RecipeError: if `max_model_len` asks for more.
        UnsupportedModelError: if vLLM computes something else for any prompt.
    """
    return prompt_limit(config, settings)[0]


def prompt_limit(config: Any, settings: EngineSettings) -> tuple[int, str]:
    """Return the tokens that a prompt may have, and the setting that limits them; see `max_prompt`."""
    _refuse(config)
    limit, reason = min(_same_up_to(config), default=(math.inf, ""))
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise RecipeError(
            f"engine.max_model_len: {settings.max_model_len} is too many for {config.model_type}: {reason}; set it to "
            f"{limit} or less, or use extract.backend: hf"
        )
    limits = [(max_positions(config), MODEL_LIMIT), (settings.max_model_len or math.inf, "engine.max_model_len")]
    tokens, name = min([*limits, (limit, reason)], key=lambda pair: pair[0])
    return int(tokens), name


def sampling_parameters(settings: GenerateSettings, number: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Return all arguments of `SamplingParams` that decide on the text of a prompt; none is left to a default.

    Args:
        settings: the recipe's.
        number: place of the prompt in the corpus.
        stop_ids: tokens that end the text.
    """
    return {
        "n": 1,
        "max_tokens": settings.max_new_tokens,
        "min_tokens": 0,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": settings.seed + number,
        "stop_token_ids": list(stop_ids),
        "detokenize": False,
    }


def _refuse(config: Any) -> None:
    reason = None
    if any(parameters.get("rope_type") == "dynamic" for parameters in rope_parameters(config)):
        reason = (
            "rope_type dynamic: vLLM rotates every prompt by one fixed table, transformers a prompt longer than "
            "max_position_embeddings by one for its length"
        )
    elif config.model_type == "stablelm" and config.qk_layernorm:
        reason = "qk_layernorm: vLLM leaves these norms out"
    if reason:
        raise UnsupportedModelError(f"{config.model_type} under vLLM: {reason}; use extract.backend: hf")


def _same_up_to(config: Any) -> list[tuple[int, str]]:
    """Tokens up to which both compute the same, and why not further."""
    found = []
    for parameters in rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            original = int(parameters["original_max_position_embeddings"])
            # Of the original length one token is lost to the one that vLLM insists to sample.
            reason = (
                f"with room for {original} or more tokens vLLM takes the long factors of rope_type longrope for every "
                "prompt, transformers only for long ones"
            )
            found.append((original - 1, reason))
    if config.model_type == "cohere2":
        reason = "its windows of sliding attention are one token wider under vLLM than under transformers"
        found.append((int(config.sliding_window), reason))
    return found
