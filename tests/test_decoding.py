"""Prompts continued by what is asked for and nothing else, against decoding by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models import by_hand, next_logits, save_model, tiny_model
from fixtures.tokenizers import byte_level_tokenizer
from transformers import GenerationConfig

from kava.decoding import continue_prompts
from kava.extract.generate import GenerateSettings
from kava.extract.hf import HFTeacher
from kava.extract.vllm.limits import sampling_parameters
from kava.hub import find_model

PROMPTS = [[5, 6, 7], [9, 8], [20, 21, 22, 23, 24, 25, 26]]
FILE = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "top_p": 0.3,
    "bad_words_ids": [[n] for n in range(100, 300)],
    "min_new_tokens": 9,
    "suppress_tokens": [7, 8],
    "max_new_tokens": 1,
}
"""What a checkpoint's `generation_config.json` may say."""


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_prompts_padded_on_the_left_are_continued_as_alone(model_type: str) -> None:
    model = tiny_model(model_type, vocab=400).double()
    free = [by_hand(model, prompt, [], 12) for prompt in PROMPTS]
    stop_ids = [free[0][4], 3]
    expected = [by_hand(model, prompt, stop_ids, 12) for prompt in PROMPTS]
    assert continue_prompts(model, PROMPTS, stop_ids=stop_ids, max_new_tokens=12) == expected
    assert continue_prompts(model, PROMPTS[2:3], stop_ids=stop_ids, max_new_tokens=12) == expected[2:3]


def test_the_models_own_way_of_generating_does_not_matter() -> None:
    model = tiny_model("llama", vocab=400).double()
    expected = [by_hand(model, prompt, [3], 8) for prompt in PROMPTS]
    model.generation_config.update(**FILE)
    model.train()
    assert continue_prompts(model, PROMPTS, stop_ids=[3], max_new_tokens=8) == expected
    assert model.training
    assert model.generation_config.repetition_penalty == FILE["repetition_penalty"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = save_model(tmp_path_factory.mktemp("model") / "model", "llama", byte_level_tokenizer(400))
    GenerationConfig(**FILE).save_pretrained(folder)
    return folder


def test_temperature_0_of_a_checkpoint_with_penalties_and_beams_is_argmax(checkpoint: Path) -> None:
    teacher = HFTeacher.load(find_model(str(checkpoint)), dtype="float32", device="cpu")
    assert teacher.model.generation_config.num_beams == 3
    written = teacher.generate(PROMPTS, GenerateSettings(max_new_tokens=10), stop_ids=[3], numbers=[0, 1, 2])
    assert written == [by_hand(teacher.model, prompt, [3], 10) for prompt in PROMPTS]


def drawn_by_hand(
    model: Any, prompt: list[int], count: int, *, temperature: float, top_k: int, top_p: float, seed: int
) -> list[int]:
    """Draws from the truncated distribution, written down independently: sorted probabilities, then `p / E` at its largest."""
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(count):
        chances = (next_logits(model, ids).float() / temperature).softmax(-1)
        order = chances.argsort(descending=True)
        kept = order[: top_k or len(order)]
        shares = chances[kept] / chances[kept].sum()
        kept = kept[: int((shares.cumsum(0) - shares < top_p).sum())]
        allowed = torch.zeros_like(chances)
        allowed[kept] = chances[kept]
        ids.append(int((allowed / torch.empty_like(chances).exponential_(generator=generator)).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.5, "top_k": 60, "top_p": 0.9},
    ],
)
def test_draws_are_from_what_the_recipe_says(checkpoint: Path, sampling: dict[str, Any]) -> None:
    teacher = HFTeacher.load(find_model(str(checkpoint)), dtype="float32", device="cpu")
    settings = GenerateSettings(max_new_tokens=10, seed=7, **sampling)
    written = teacher.generate(PROMPTS, settings, stop_ids=[399], numbers=[4, 5, 6])
    how: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    assert written == [
        drawn_by_hand(teacher.model, prompt, 10, seed=7 + number, **how)
        for prompt, number in zip(PROMPTS, (4, 5, 6), strict=True)
    ]
    alone = [
        teacher.generate([prompt], settings, stop_ids=[399], numbers=[number])[0]
        for prompt, number in zip(PROMPTS, (4, 5, 6), strict=True)
    ]
    assert alone == written


def test_more_than_50_tokens_can_be_drawn_as_often_as_they_are_likely() -> None:
    model = tiny_model("llama", vocab=96, layers=1, scale=1.0)
    prompt, count = [5, 6, 7], 4000
    chances = next_logits(model, prompt).softmax(-1)
    drawn = continue_prompts(
        model, [prompt] * count, stop_ids=[], max_new_tokens=1, temperature=1.0, seeds=range(count)
    )
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=96)
    assert int((counts > 0).sum()) > 80
    chi_squared = float(((counts - count * chances) ** 2 / (count * chances)).sum())
    assert chi_squared < 95 + 4 * (2 * 95) ** 0.5


def test_vllm_is_told_every_parameter() -> None:
    settings = GenerateSettings(max_new_tokens=9, temperature=0.6, top_p=0.95, top_k=20, seed=3)
    assert sampling_parameters(settings, 4, [2, 7]) == {
        "n": 1,
        "max_tokens": 9,
        "min_tokens": 0,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": 7,
        "stop_token_ids": [2, 7],
        "detokenize": False,
    }
