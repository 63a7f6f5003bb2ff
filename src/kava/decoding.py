"""Continuing prompts with a Hugging Face model, by nothing but what the caller asks for.

`generate` fills whatever is not passed from the checkpoint's `generation_config.json`: penalties, beams, bans of
n-grams, `top_k: 50`. Here that file is replaced while the model writes. Sampling is an argmax over perturbed logits
(Gumbel 1954) with a random generator for each prompt, so that a draw does not depend on the other prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continue_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """Continue each prompt until a stop token, which is left out.

    Args:
        model: a causal language model; in evaluation mode for the while.
        prompts: token ids, of any lengths; at least one token each.
        stop_ids: tokens that end a continuation.
        max_new_tokens: of each continuation.
        temperature: divisor of the logits; 0 takes the likeliest token every time.
        top_k: likeliest tokens that are drawn from; 0 for all.
        top_p: smallest share of the probability that the likeliest tokens must have together; 1 for no limit.
        seeds: of the draws for each prompt; needed with a temperature.
    """
    import torch
    from transformers import GenerationConfig

    device, longest = next(model.parameters()).device, max(map(len, prompts))
    pad = int(stop_ids[0]) if stop_ids else 0
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(stop_ids) or None,
    )
    training, own = model.training, model.generation_config
    model.eval()
    try:
        model.generation_config = how
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=how,
                logits_processor=_draws(temperature, top_k, top_p, seeds, device) if temperature else None,
            )
    finally:
        model.generation_config = own
        model.train(training)
    return [_until_stop(row, set(stop_ids)) for row in written[:, longest:].tolist()]


def _draws(temperature: float, top_k: int, top_p: float, seeds: Sequence[int], device: Any) -> Any:
    """Logits processors after which the argmax is a draw."""
    import torch
    from transformers import (
        LogitsProcessor,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    class Perturb(LogitsProcessor):  # type: ignore[misc]
        """Adds Gumbel noise, minus the logarithm of an exponential variable, to each row from its own generator."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for row, generator in zip(scores, generators, strict=True):
                row -= torch.empty_like(row).exponential_(generator=generator).clamp_min_(1e-38).log_()
            return scores

    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(Perturb())
    return processors


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))]
