from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures.models import tiny_model
from fixtures.tokenizers import byte_level_tokenizer

from kava.errors import CorpusError
from kava.extract import Encoder, Record
from kava.extract.generate import GenerateSettings, Question, prompt_ids, question_of, row_of
from kava.extract.hf import HFTeacher
from kava.store import Segment, Split


def test_a_row_keeps_the_records_answer_or_takes_the_teachers() -> None:
    question = Question("q", "How many?", "#### 7", heldout=True)
    row = row_of(question, " Three and four.\n#### 7 ")
    assert row == {
        "id": "q",
        "prompt": "How many?",
        "rationale": "Three and four.",
        "answer": "#### 7",
        "split": "heldout",
        "matches": True,
    }
    open_question = Question("q", "How many?", "", heldout=False)
    assert row_of(open_question, "Four.\n#### 4")["answer"] == "#### 4"
    assert "answer" not in row_of(open_question, "Four.")
    assert row_of(open_question, "Four.")["rationale"] == "Four."


def test_questions_come_from_segments() -> None:
    text = "How many?\nThree.\n#### 3"
    segments = ((0, 9, Segment.PROMPT), (9, 16, Segment.RATIONALE), (16, len(text), Segment.ANSWER))
    record = Record("q", text, segments, (("user", 0, 9),), Split.HELDOUT)
    assert question_of(record) == Question("q", "How many?", "#### 3", heldout=True)
    with pytest.raises(CorpusError, match="'t' has no prompt"):
        question_of(Record("t", "x", ((0, 1, Segment.ANSWER),), (("assistant", 0, 1),)))


def test_prompts_are_plain_or_templated() -> None:
    tokenizer = byte_level_tokenizer(400)
    question, settings = Question("q", "How many?", "", heldout=False), GenerateSettings(instruction=" Think.")
    plain = prompt_ids(Encoder(tokenizer), question, settings)
    assert tokenizer.decode(plain) == "How many? Think.\n"
    templated = prompt_ids(Encoder(tokenizer, chat_template=True), question, settings)
    assert tokenizer.decode(templated) == "<|im|>user\nHow many? Think.<|end|>\n"


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_hugging_face_writes_the_same_twice_and_stops(settings: dict[str, Any]) -> None:
    teacher = HFTeacher(tiny_model("llama", vocab=400), batch_tokens=64)
    how = GenerateSettings(max_new_tokens=12, **settings)
    prompts = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25]]
    written, again = (teacher.generate(prompts, how, stop_ids=[0], numbers=[0, 1, 2]) for _ in range(2))
    assert written == again
    stop = written[0][3]
    shorter = teacher.generate(prompts, how, stop_ids=[stop], numbers=[0, 1, 2])
    assert shorter[0] == written[0][: written[0].index(stop)]
    if not settings:  # Greedy: each token is the likeliest after those before it.
        for prompt, tokens in zip(prompts, written, strict=True):
            with torch.no_grad():
                logits = teacher.model(input_ids=torch.tensor([prompt + tokens])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
