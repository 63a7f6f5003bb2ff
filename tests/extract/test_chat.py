"""Records under the chat templates that people use: spans, the end of a turn, dates, and what is refused."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest
from fixtures.templates import CHATML, DATED, GEMMA, LLAMA2, LLAMA3, MISTRAL, PHI3, QWEN3, ZEPHYR, chat_tokenizer

from kava.errors import CorpusError, RecipeError
from kava.extract import Encoder, Record
from kava.extract.tokens import Tokens
from kava.store import KVSample, Segment, Split
from kava.train.data import TargetCollator

GEMMA_LISTS = GEMMA.replace(
    "message['content'] | trim",
    "(message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join)",
)
"""Gemma 3, in short."""
P, R, A = Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER


def _record(*pieces: tuple[str, str, Segment], messages: list[dict[str, Any]] | None = None) -> Record:
    """A record of `(role, text, segment)`, joined by line breaks."""
    text, segments, turns = "", [], []
    for role, piece, segment in pieces:
        start = len(text)
        text += ("\n" if text else "") + piece
        segments.append((start, len(text), segment))
        turns.append((role, len(text) - len(piece), len(text)))
    return Record("id", text, tuple(segments), tuple(turns), messages=tuple(messages or ()))


QUESTION = _record(("user", "How many?", P), ("assistant", "Four.", A))
CHAT = _record(("user", "How many?", P), ("assistant", "Four.", A), ("user", "Sure?", P), ("assistant", "Yes.", A))


def _encode(template: str, record: Record, **options: Any) -> tuple[Any, Tokens]:
    tokenizer = chat_tokenizer(template)
    return tokenizer, Encoder(tokenizer, chat_template=True, add_eos=True, **options).encode(record)


def _labels(tokens: Tokens, *segments: str) -> list[int]:
    sample = KVSample(
        sample_id="id",
        split=Split.TRAIN,
        keys=None,
        values=None,
        input_ids=tokens.input_ids,
        positions=tokens.positions,
        spans=tokens.spans,
        segments=tokens.segments,
        mask=np.zeros(len(tokens), np.bool_),
    )
    batch = TargetCollator(0, segments or ("answer",))([sample])
    return [int(label) for label in batch["labels"][0]]


def _texts(record: Record, tokens: Tokens) -> dict[str, str]:
    """The bytes that the tokens of each segment cover."""
    raw = record.text.encode()
    return {
        segment.name: b"".join(raw[a:b] for a, b in tokens.spans[tokens.segments == segment].tolist()).decode()
        for segment in Segment
        if (tokens.segments == segment).any()
    }


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (ZEPHYR, "</s>"),
        (LLAMA3, "<|eot_id|>"),
        (LLAMA2, "</s>"),
        (MISTRAL, "<|end|>"),
        (PHI3, "<|end|>"),
    ],
    ids=["chatml", "gemma", "zephyr", "llama-3", "llama-2", "mistral", "phi-3"],
)
@pytest.mark.parametrize("record", [QUESTION, CHAT], ids=["one turn", "two turns"])
def test_the_end_of_an_assistants_turn_is_learned(template: str, end: str, record: Record) -> None:
    tokenizer, tokens = _encode(template, record)
    ids, number = tokens.input_ids.tolist(), tokenizer.convert_tokens_to_ids(end)
    turns = [segment for *_, segment in record.segments]
    ends = [place for place, token in enumerate(ids) if token == number]
    if template in (LLAMA2, MISTRAL):
        turns = [turn for turn in turns if turn == A]  # Its users' turns have no end token.
    assert [ids[place] == number for place in ends[-len(turns) :]] == [True] * len(turns)
    learned = [place for place, label in enumerate(_labels(tokens)) if label >= 0]
    answers = [place for place in learned if tokens.segments[place] == A]
    assert [place for place in learned if place not in answers] == [
        place for place, turn in zip(ends[-len(turns) :], turns, strict=True) if turn == A
    ]
    assert "".join(tokenizer.decode([ids[p]]) for p in answers).replace(" ", "") in ("Four.", "Four.Yes.")
    # No second end: Phi-3's template prints one of its own, which is not learned.
    own = 1 if template == PHI3 else 0
    assert ids.count(tokenizer.eos_token_id) == (len(ends) if tokenizer.eos_token == end else own)
    # It has no text, so it has no target.
    assert (tokens.spans[tokens.segments == Segment.TURN] == 0).all()
    assert Encoder(tokenizer, chat_template=True).stop_ids == [number]


def test_the_line_break_behind_the_end_of_a_turn_is_not_learned() -> None:
    tokenizer, tokens = _encode(CHATML, QUESTION)
    written = [tokenizer.decode([number]) for number in tokens.input_ids[-2:]]
    assert written == ["<|im_end|>", "\n"]
    assert tokens.segments[-2:].tolist() == [Segment.TURN, Segment.NONE]
    assert _labels(tokens)[-2:] == [tokens.input_ids[-2], -100]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_without_an_end_gets_one_and_all_up_to_it_is_learned(template: str) -> None:
    tokenizer, tokens = _encode(template, QUESTION)
    after = tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN])
    assert after == ("\n<|end|>" if template.endswith("\n{% endfor %}") else "<|end|>")
    assert _labels(tokens)[-1] == tokenizer.eos_token_id
    assert Encoder(tokenizer, chat_template=True).stop_ids == []


def test_a_template_that_insists_on_a_system_prompt() -> None:
    insisting = "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHATML
    tokenizer, tokens = _encode(
        insisting, _record(("system", "Be.", P), ("user", "How many?", P), ("assistant", "Four.", A))
    )
    assert tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN]) == "<|im_end|>"
    with pytest.raises(CorpusError, match="roles user, assistant: no system prompt"):
        _encode(insisting, QUESTION)


def test_an_end_that_only_the_last_turn_has() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer, tokens = _encode(template, CHAT)
    assert tokens.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert _labels(tokens)[-1] == tokenizer.eos_token_id
    assert (tokens.segments == Segment.TURN).sum() == 1


def test_a_chat_that_ends_with_the_user_gets_no_end() -> None:
    record = _record(("user", "Hi.", P), ("assistant", "Yes?", A), ("user", "How many?", P))
    tokenizer, tokens = _encode(CHATML, record)
    assert tokenizer.eos_token_id not in tokens.input_ids
    assert (tokens.segments == Segment.TURN).sum() == 1
    assert _labels(tokens)[-1] == -100
    _, tokens = _encode(CHATML, _record(("user", "How many?", P)))
    assert _labels(tokens, "prompt")[-2:] == [-100, -100]


def test_plain_samples_end_as_before() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokens = Encoder(tokenizer, add_eos=True).encode(QUESTION)
    assert tokens.segments[-1] == Segment.NONE
    assert _labels(tokens)[-1] == tokenizer.eos_token_id


# Dates.


def test_a_template_that_prints_the_date_needs_one() -> None:
    with pytest.raises(RecipeError, match=r"^chat_template_date: .* prints today's date"):
        _encode(DATED, QUESTION)
    tokenizer, tokens = _encode(DATED, QUESTION, chat_template_date=datetime.date(2025, 1, 2))
    assert "Today Date: 02 Jan 2025<|eot_id|>" in tokenizer.decode(tokens.input_ids)
    _, plain = _encode(LLAMA3, QUESTION)
    _, dated = _encode(LLAMA3, QUESTION, chat_template_date=datetime.date(2025, 1, 2))
    assert plain.input_ids.tolist() == dated.input_ids.tolist()


def test_the_time_of_day_is_midnight() -> None:
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + LLAMA3
    tokenizer, tokens = _encode(template, QUESTION, chat_template_date=datetime.date(2025, 1, 2))
    assert tokenizer.decode(tokens.input_ids).startswith("2025-01-02 00:00:00")


@pytest.mark.parametrize("call", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(call: str) -> None:
    with pytest.raises(RecipeError, match="no two renderings are equal"):
        _encode(call + LLAMA3, QUESTION)


# Spans are of what is rendered.

THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


def test_qwen3_renders_its_own_output_verbatim() -> None:
    record = _record(("user", "How many?", P), ("assistant", THOUGHT, A))
    tokenizer, tokens = _encode(QWEN3, record)
    assert _texts(record, tokens) == {"NONE": "", "PROMPT": "How many?", "ANSWER": THOUGHT, "TURN": ""}
    assert tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN]) == "<|im_end|>"
    written = tokenizer.decode(tokens.input_ids)
    assert written == f"<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n{THOUGHT}<|im_end|>\n"


def test_white_space_that_qwen3_adds_is_template() -> None:
    content = "<think>Two and two.</think>Four."
    record = _record(("user", "How many?", P), ("assistant", content, A))
    tokenizer, tokens = _encode(QWEN3, record)
    assert _texts(record, tokens)["ANSWER"] == content
    assert tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN]) == "\n\n\n\n<|im_end|>"


def test_reasoning_content_is_rendered_between_its_marks_which_are_learned() -> None:
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "Four."},
    ]
    pieces = (("user", "How many?", P), ("assistant", "Two and two.", R), ("assistant", "Four.", A))
    record = _record(*pieces, messages=messages)
    tokenizer, tokens = _encode(QWEN3, record)
    texts = _texts(record, tokens)
    assert (texts["RATIONALE"], texts["ANSWER"]) == ("Two and two.", "Four.")
    marks = tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN])
    assert marks == "<think>\n\n</think>\n\n<|im_end|>"
    assert all(_labels(tokens)[place] >= 0 for place in np.flatnonzero(tokens.segments == Segment.TURN))


@pytest.mark.parametrize(
    "prompt", ["user", "assistant", "system\nuser", "<|im_end|>", "</think>", "\ue000\U000f0001\ue001"]
)
@pytest.mark.parametrize("template", [CHATML, QWEN3], ids=["chatml", "qwen3"])
def test_texts_that_look_like_the_template(template: str, prompt: str) -> None:
    record = _record(("user", prompt, P), ("assistant", THOUGHT, A))
    tokenizer, tokens = _encode(template, record)
    assert _texts(record, tokens)["PROMPT"] == prompt
    assert _texts(record, tokens)["ANSWER"] == THOUGHT
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [p for p, s in enumerate(tokens.segments) if s == Segment.TURN] == [tokens.input_ids.tolist().index(end, -3)]


def test_a_long_text_has_fewer_anchors_than_characters() -> None:
    long = "".join(f"{n} and " for n in range(20_000))
    record = _record(("user", long, P), ("assistant", "Four.", A))
    tokens = Encoder(chat_tokenizer(CHATML), chat_template=True).encode(record)
    assert len(long) > 140_000
    assert _texts(record, tokens)["PROMPT"] == long


# Messages as they are given.


def test_an_empty_system_prompt_stays_empty() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes?"},
    ]
    record = _record(("user", "Hi.", P), ("assistant", "Yes?", A), messages=messages)
    tokenizer, tokens = _encode(CHATML, record)
    assert tokenizer.decode(tokens.input_ids).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi.")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("content", ["", None])
def test_tool_calls_and_empty_turns_stay_and_are_learned(content: str | None) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    record = _record(("user", "Add.", P), ("tool", "2", P), ("assistant", "Two.", A), messages=messages)
    tokenizer, tokens = _encode(QWEN3, record)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    learned = tokenizer.decode(tokens.input_ids[tokens.segments == Segment.TURN])
    assert learned == call + "<think>\n\n</think>\n\n<|im_end|>"
    assert _texts(record, tokens)["PROMPT"] == "Add.2"


@pytest.mark.parametrize("template", [CHATML, GEMMA_LISTS], ids=["strings alone", "lists too"])
def test_content_in_parts(template: str) -> None:
    parts = [{"type": "text", "text": "How"}, {"type": "text", "text": " many?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Four."}]
    record = _record(("user", "How", P), ("user", " many?", P), ("assistant", "Four.", A), messages=messages)
    tokenizer, tokens = _encode(template, record)
    assert "How many?" in tokenizer.decode(tokens.input_ids)
    assert _texts(record, tokens) == {"NONE": "", "PROMPT": "How many?", "ANSWER": "Four.", "TURN": ""}


def test_two_assistant_turns_stay_two() -> None:
    record = _record(("user", "Hi.", P), ("assistant", "One.", A), ("assistant", "Two.", A))
    tokenizer, tokens = _encode(CHATML, record)
    assert "One.<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>" in tokenizer.decode(tokens.input_ids)
    assert (tokens.segments == Segment.TURN).sum() == 2


def test_composed_and_decomposed_text_is_one() -> None:
    messages = [{"role": "user", "content": "cafe\u0301"}, {"role": "assistant", "content": "Four."}]
    record = _record(("user", "caf\u00e9", P), ("assistant", "Four.", A), messages=messages)
    _, tokens = _encode(CHATML, record)
    assert _texts(record, tokens)["PROMPT"] == "caf\u00e9"


_PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_USER = {"role": "user", "content": "Hi."}


@pytest.mark.parametrize(
    ("template", "pieces", "messages", "fault"),
    [
        (_PLAIN, [("user", "Hi.", P), ("assistant", "So.", R), ("assistant", "Yes?", A)],
         [_USER, {"role": "assistant", "reasoning_content": "So.", "content": "Yes?"}],
         r"messages\[1\]\.reasoning_content: the chat template leaves out 'So\.'"),
        (QWEN3, [("user", "Hi.", P), ("assistant", THOUGHT, A), ("user", "Sure?", P), ("assistant", "Yes.", A)], None,
         r"messages\[1\]\.content: the chat template leaves out '<think>"),
        (_PLAIN, [("user", "Hi.", P)], [_USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
         r"messages\[1\]\.tool_calls\[0\]: the chat template leaves it out"),
        ("{% for m in messages if m.content %}<{{ m.role }}>{{ m.content }}{% endfor %}", [("user", "Hi.", P), ("assistant", "Yes?", A)],
         [{"role": "system", "content": ""}, _USER, {"role": "assistant", "content": "Yes?"}],
         r"messages\[0\]\.content: the chat template leaves out the system message ''"),
        ("{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}<{{ m.role }}>{% else %}{{ '\n' }}{% endif %}{{ m.content }}{% endfor %}",
         [("user", "Hi.", P), ("assistant", "One.", A), ("assistant", "Two.", A)], None,
         r"messages\[2\]: the chat template merges two messages of the role assistant"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [("user", "how", P)], None, "changes the text of a message"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", [("user", "how", P)], None, "repeats or reorders"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", [("user", "how", P), ("assistant", "so", A)], None, "repeats or reorders"),
        (GEMMA, [("system", "Be.", P), ("user", "Hi.", P)], None, "System role not supported"),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", [("user", "how many", P)], None, r"messages\[0\]\.content: the chat template leaves out 'any'"),
        ("{% if %}", [("user", "how", P)], None, "not valid Jinja"),
    ],
    ids=["reasoning", "earlier thought", "tool call", "empty system", "merged", "upper", "twice", "reversed", "refused", "cut", "no jinja"],
)  # fmt: skip
def test_what_a_template_cannot_render_is_refused_with_the_field(
    template: str, pieces: list[Any], messages: Any, fault: str
) -> None:
    with pytest.raises(CorpusError, match=rf"sample 'id': .*{fault}"):
        _encode(template, _record(*pieces, messages=messages))


def test_a_tokenizer_without_a_template() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match="the tokenizer has no chat template"):
        Encoder(tokenizer, chat_template=True).encode(QUESTION)
