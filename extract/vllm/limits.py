"""Where vLLM computes other numbers than transformers: refused by name before the engine starts, or kept out of reach.

The worker compares the rotary table of the running engine with that of transformers besides.
"""

from __future__ import annotations

import math
from typing import Any

from ...errors import RecipeError, UnsupportedModelError
from ..rope import rope_parameters
from .settings import EngineSettings


def max_prompt(config: Any, settings: EngineSettings) -> int:
    """How many tokens a prompt may have, so that vLLM computes what transformers does.

    Raises:
        RecipeError: if `max_model_len` asks for more.
        UnsupportedModelError: if vLLM computes something else for any prompt.
    """
    _refuse(config)
    limit, reason = min(_same_up_to(config), default=(math.inf, ""))
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise RecipeError(
            f"engine.max_model_len: {settings.max_model_len} is too many for {config.model_type}: {reason}; set it to "
            f"{limit} or less, or use extract.backend: hf"
        )
    return int(min(config.max_position_embeddings, settings.max_model_len or math.inf, limit))


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
