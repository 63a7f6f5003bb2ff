"""Questions answered: greedy continuations of held-out prompts, and how often their number is the right one.

A prompt is what stands before the first token that the model writes itself, token for token as in training; the right
answer is the number that the sample's own answer ends in. Several prompts are continued at once, padded on the left:
padding is not seen and not counted in positions, so that each continuation is that of its prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers import final_number, same_number
from ..decoding import continue_prompts
from ..errors import StageError
from ..store import KVSample, Segment, Split

if TYPE_CHECKING:
    from .data import Targets


@dataclass(frozen=True)
class Question:
    """A held-out sample whose answer is a number."""

    sample_id: str
    prompt: list[int]
    """Token ids."""
    answer: str
    """The text of its answer."""


@dataclass(frozen=True)
class Answer:
    """What a student wrote."""

    sample_id: str
    written: str
    answer: str
    """The right one, as text."""
    right: bool


@dataclass(frozen=True)
class ExactMatch:
    """How many of the answers are right."""

    answers: list[Answer]

    @property
    def right(self) -> int:
        """Their number."""
        return sum(answer.right for answer in self.answers)

    @property
    def share(self) -> float:
        """Of all answers."""
        return self.right / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the share, after Wilson 1927: it has a width even where none is right."""
        count, z = len(self.answers), 1.959963984540054
        middle = (self.share + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * math.sqrt(self.share * (1 - self.share) / count + (z / (2 * count)) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)


def questions_of(store: Targets, tokenizer: Any, limit: int | None = None) -> list[Question]:
    """The held-out samples that have a prompt, and an answer with a number in it; the first `limit` of them.

    Raises:
        StageError: if there are none.
    """
    found: list[Question] = []
    for index in store.indices(Split.HELDOUT):
        if limit is not None and len(found) == limit:
            break
        sample = store.sample(index, keys=False, values=False, extras=False)
        if (question := question_of(sample, tokenizer)) is not None:
            found.append(question)
    if not found:
        raise StageError(
            f"{store.path}: no held-out sample has both a prompt and an answer that ends in a number; exact match "
            "needs some (--no-generate leaves it out)"
        )
    return found


def question_of(sample: KVSample, tokenizer: Any) -> Question | None:
    """The question in a sample; None if it has no prompt, or no number in its answer."""
    written = np.isin(sample.segments, [int(Segment.RATIONALE), int(Segment.ANSWER), int(Segment.TURN)])
    start = int(written.argmax()) if written.any() else 0
    if not (sample.segments[:start] == int(Segment.PROMPT)).any():
        return None
    answer = tokenizer.decode(sample.input_ids[sample.segments == int(Segment.ANSWER)].tolist())
    if final_number(answer) is None:
        return None
    return Question(sample.sample_id, sample.input_ids[:start].tolist(), answer)


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_answer: Callable[[int], None] = lambda count: None,
) -> ExactMatch:
    """Continues every prompt greedily, and compares numbers: that after the first mark, or else the last one.

    Args:
        model: the student.
        tokenizer: its own.
        questions: at least one.
        stop_ids: tokens that end a continuation.
        max_new_tokens: of each continuation.
        batch_size: prompts at a time; longer ones together.
        on_answer: called with the number of answers that came.
    """
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [questions[number].prompt for number in batch]
        continued = continue_prompts(model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        for number, ids in zip(batch, continued, strict=True):
            question, written = questions[number], tokenizer.decode(ids)
            right = same_number(written, question.answer, first_mark=True)
            found[number] = Answer(question.sample_id, written, question.answer, right)
        on_answer(len(batch))
    return ExactMatch([found[number] for number in range(len(questions))])
