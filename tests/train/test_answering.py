"""Greedy answers: many prompts at once give what each gives alone, and only what is right counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fixtures.models import by_hand, tiny_model
from fixtures.stores import sample
from fixtures.tokenizers import byte_level_tokenizer

from kava.store import KVSample, Segment
from kava.train.answering import Answer, ExactMatch, Question, answer, question_of

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28], [31, 5], [8, 8, 8, 8]]


def texts(tokenizer: Any, prompt: str, rationale: str, answered: str) -> KVSample:
    """A sample of three segments."""
    pieces = [tokenizer(text)["input_ids"] for text in (prompt, rationale, answered)]
    kinds = [Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER]
    segments = [int(kind) for kind, ids in zip(kinds, pieces, strict=True) for _ in ids]
    ids = [i for piece in pieces for i in piece]
    base: KVSample = sample(0, len(ids))
    return replace(base, input_ids=np.asarray(ids, np.int32), segments=np.asarray(segments, np.uint8))


def test_a_prompt_is_what_stands_before_the_rationale() -> None:
    tokenizer = byte_level_tokenizer(400)
    found = question_of(texts(tokenizer, "How many?", "\nOne and one.", "\n#### 2"), tokenizer)
    assert found is not None
    assert tokenizer.decode(found.prompt) == "How many?"
    assert found.answer == "\n#### 2"
    assert question_of(texts(tokenizer, "", "One.", "#### 2"), tokenizer) is None
    assert question_of(texts(tokenizer, "How many?", "One.", "#### none"), tokenizer) is None


def test_answers_come_in_the_order_of_the_questions_and_are_judged() -> None:
    tokenizer, model = byte_level_tokenizer(400), tiny_model("llama", vocab=400).double()
    alone = [tokenizer.decode(by_hand(model, prompt, [3], 6)) for prompt in PROMPTS]
    questions = [Question(f"q{n}", prompt, "#### 7") for n, prompt in enumerate(PROMPTS)]
    counted: list[int] = []
    found = answer(model, tokenizer, questions, stop_ids=[3], max_new_tokens=6, batch_size=2, on_answer=counted.append)
    assert [a.sample_id for a in found.answers] == [q.sample_id for q in questions]
    assert [a.written for a in found.answers] == alone
    assert counted == [2, 2, 1]


def test_the_share_and_its_interval() -> None:
    def of(right: int, count: int) -> ExactMatch:
        return ExactMatch([Answer(str(n), "", "", n < right) for n in range(count)])

    # Wilson's interval of 8 in 10, to four places, as in the literature.
    assert of(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert of(0, 50).interval == pytest.approx((0.0, 0.0713), abs=5e-4)
    assert (of(3, 4).right, of(3, 4).share) == (3, 0.75)
