"""The teacher writes the rationales: prompts in, a corpus of its own reasoning out.

What is captured later is teacher-forced on that text like on any other corpus, so several teachers can read it. A final
answer is recognised as GSM8K marks it: the number after the last `####`, or else the last number of the text (Cobbe
et al. 2021, https://arxiv.org/abs/2110.14168).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ..answers import MARK, same_number
from ..errors import CorpusError
from ..store import Segment
from .corpus import Record
from .tokens import Encoder


class GenerateSettings(BaseModel):
    """How the teacher writes. Everything here but `chunk` determines the text, and nothing else of the model's does.

    What its `generation_config.json` says of sampling, penalties and beams is not used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str | None = None
    """Which teacher writes; the recipe's first if None. All teachers then read what it wrote."""
    instruction: str = ""
    """Put after the prompt when asking, and not part of the corpus."""
    max_new_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divisor of the logits; 0 takes the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the probability that the likeliest tokens must have together; 1 for no limit."""
    top_k: NonNegativeInt = 0
    """Likeliest tokens that are drawn from; 0 for all."""
    seed: int = 0
    """Seed of the draws."""
    keep: Literal["all", "matching"] = "all"
    """`matching`: only samples whose final number is that of the record's answer."""
    chunk: PositiveInt = 256
    """Prompts after which what was written is saved, to go on from."""


class Writer(Protocol):
    """What can continue prompts."""

    backend: str

    @property
    def max_tokens(self) -> int:
        """Of prompt and continuation together."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        settings: GenerateSettings,
        *,
        stop_ids: Sequence[int],
        numbers: Sequence[int],
    ) -> list[list[int]]:
        """Continues each prompt until a stop token; `numbers` are the prompts' places in the corpus, for seeds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Question:
    """What is asked of the teacher, and the right answer if it is known."""

    sample_id: str
    prompt: str
    answer: str
    heldout: bool


def question_of(record: Record) -> Question:
    """A record's prompt and answer.

    Raises:
        CorpusError: if it has no prompt.
    """
    parts = {
        kind: "".join(record.text[start:stop] for start, stop, of in record.segments if of is kind).strip()
        for kind in (Segment.PROMPT, Segment.ANSWER)
    }
    if not parts[Segment.PROMPT]:
        raise CorpusError(f"sample {record.sample_id!r} has no prompt; extract.generate needs one in every record")
    return Question(record.sample_id, parts[Segment.PROMPT], parts[Segment.ANSWER], bool(record.split))


def prompt_ids(encoder: Encoder, question: Question, settings: GenerateSettings) -> list[int]:
    """The ids that the teacher continues: the prompt as a user's turn, or as plain text and a line break."""
    text = question.prompt + settings.instruction
    tokenizer = encoder.tokenizer
    if encoder.chat_template:
        text = encoder.template.render([{"role": "user", "content": text}], ask=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text + "\n")["input_ids"])


def row_of(question: Question, written: str) -> dict[str, Any]:
    """A corpus row: what the teacher wrote is the rationale, the answer is the record's, or else the teacher's own."""
    rationale, mark, given = written.strip().rpartition(MARK)
    if not mark:
        rationale, given = written.strip(), ""
    row: dict[str, Any] = {"id": question.sample_id, "prompt": question.prompt, "rationale": rationale.strip()}
    answer = question.answer or (f"{MARK} {given.strip()}" if mark else "")
    if answer:
        row["answer"] = answer
    return {
        **row,
        "split": "heldout" if question.heldout else "train",
        "matches": same_number(written, question.answer),
    }
