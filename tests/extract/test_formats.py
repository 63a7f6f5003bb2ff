"""Layouts of records that are read as they are, and what of them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.tokenizers import TEXTS, byte_level_tokenizer

from kava.errors import CorpusError
from kava.extract import Corpus, CorpusSettings, Encoder, Record, load_corpus
from kava.pipeline.plan.tokens import count_tokens
from kava.store import Segment

P, R, A = Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER
Load = Callable[..., Corpus]
GSM8K = {"question": "How many?", "answer": "2 + 2 = 4.\n4 + 3 = 7.\n#### 7"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def inner(*rows: Any, **settings: Any) -> Corpus:
        path = tmp_path / "corpus.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return load_corpus(CorpusSettings.model_validate({"path": str(path), **settings}))

    return inner


def _segments(record: Record) -> list[tuple[Segment, str]]:
    return [(kind, record.text[start:stop]) for start, stop, kind in record.segments]


def _steps(record: Record) -> list[str]:
    return [record.text.encode()[start:stop].decode() for start, stop in record.steps]


@pytest.mark.parametrize(
    ("row", "segments", "note"),
    [
        (
            GSM8K,
            [(P, "How many?"), (R, "\n2 + 2 = 4.\n4 + 3 = 7."), (A, "\n#### 7")],
            "GSM8K: rationale and answer split at ####",
        ),
        (
            {"question": "Q", "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"},
            [(P, "Q"), (R, "\n<<1+1=2>>\n<<2+2=4>>"), (A, "\n4")],
            "GSM8K-AUG: the rationale is the list of steps",
        ),
        ({"question": "Q", "cot": "C", "answer": "4"}, [(P, "Q"), (R, "\nC"), (A, "\n4")], "question/cot/answer"),
        ({"question": "Q", "answer": "4"}, [(P, "Q"), (A, "\n4")], "question/answer: there is no rationale"),
        ({"prompt": "Q", "completion": "C"}, [(P, "Q"), (A, "\nC")], "prompt/completion: the completion is the answer"),
        ({"prompt": "Q", "rationale": ["a", "b"]}, [(P, "Q"), (R, "\na\nb")], "prompt/rationale/answer"),
        (
            {"instruction": "Do", "input": "this", "output": "Done"},
            [(P, "Do"), (P, "\nthis"), (A, "\nDone")],
            "Alpaca: the prompt is instruction and input",
        ),
        ({"instruction": "Do", "input": "", "output": "Done"}, [(P, "Do"), (A, "\nDone")], "Alpaca"),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "C"}]},
            [(P, "S"), (P, "\nQ"), (A, "\nC")],
            "ShareGPT: turns from conversations",
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "C"}]},
            [(P, "Q"), (A, "\nC")],
            "conversational prompt/completion",
        ),
        ({"text": "T"}, [(A, "T")], "text: all of it is answer"),
        ({"answer": "T"}, [(A, "T")], "one segment: prompt, rationale or answer alone"),
    ],
)
def test_formats_are_recognised(load: Load, row: Any, segments: list[Any], note: str) -> None:
    corpus = load(row)
    assert _segments(corpus.records[0]) == segments
    assert corpus.notes[0].startswith(note)
    assert len(corpus.notes) == 1, corpus.notes  # Every column is read.


def test_steps_are_byte_ranges_of_the_text(load: Load) -> None:
    row = {"question": "Où?", "steps": ["é = 1", "é = 1", "東 = 2"], "answer": "2"}
    (record,) = load(row).records
    assert _steps(record) == ["é = 1", "é = 1", "東 = 2"]
    assert record.steps[0] == (5, 11)
    assert _steps(load(GSM8K).records[0]) == ["2 + 2 = 4.", "4 + 3 = 7."]
    (record,) = load(row, drop_last_step=True, answer_prefix="#### ").records
    assert record.text == "Où?\né = 1\né = 1\n#### 2"
    assert _steps(record) == ["é = 1", "é = 1"]
    (record,) = load(GSM8K, drop_last_step=True).records
    assert record.text == "How many?\n2 + 2 = 4.\n#### 7"
    assert load(row).digest != load({**row, "steps": ["é = 1\né = 1", "東 = 2"]}).digest


def test_formats_are_mixed_and_counted(load: Load) -> None:
    corpus = load(GSM8K, {"question": "Q", "answer": "no mark"}, GSM8K, heldout=None)
    assert corpus.notes == (
        "GSM8K: rationale and answer split at #### (2 records)",
        "question/answer: there is no rationale (1 records)",
    )
    assert corpus.segment_records[R] == 2


def test_split_prefix_and_named_fields(load: Load) -> None:
    row = {"problem": "Q", "solution": "A step.\n#### not yet\n#### 4", "source": "x"}
    named = {"fields": {"prompt": "problem", "answer": "solution"}}
    corpus = load(row, **named)
    assert _segments(corpus.records[0]) == [(P, "Q"), (A, "\nA step.\n#### not yet\n#### 4")]
    assert corpus.notes == (
        "named fields: prompt from problem, rationale from rationale, answer from solution",
        "columns that are not read: source",
        "1 answers contain #### and their records have no rationale; corpus.split: {field: NAME, at: '####'} splits them",
    )
    split = load(row, **named, split={"field": "solution", "at": "####"})
    assert split.records[0].text == corpus.records[0].text
    assert _segments(split.records[0])[1:] == [(R, "\nA step.\n#### not yet"), (A, "\n#### 4")]
    assert split.records[0].turns == (("user", 0, 1), ("assistant", 2, len(split.records[0].text)))
    (record,) = load(GSM8K, split={"field": "answer", "at": "#### "}).records
    assert record.digest == load(GSM8K).records[0].digest
    (record,) = load({"text": "think </t> say"}, split={"field": "text", "at": "</t>"}).records
    assert _segments(record) == [(R, "think"), (A, " </t> say")]
    (record,) = load({"prompt": "Q", "answer": "#### 4"}, answer_prefix="#### ").records
    assert record.text == "Q\n#### 4"


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (GSM8K, {"fields": {"prompt": "qestion"}}, r"no record has the field 'qestion', named by corpus\.fields\.prompt; the fields are question, answer"),
        (GSM8K, {"fields": {"id": "key"}}, "no record has the field 'key'"),
        ({"problem": "Q", "solution": "A"}, {}, "none of the known formats fits; the fields are problem, solution"),
        (GSM8K, {"split": {"field": "solution", "at": "##"}}, "corpus.split.field 'solution' is not read. Name one of question, answer"),
        (GSM8K, {"split": {"field": "answer", "at": "@@"}}, "'answer' does not contain '@@'"),
        ({"prompt": "Q", "rationale": "R", "answer": "#### 1"}, {"split": {"field": "answer", "at": "##"}}, "has one already"),
        ({"prompt": "Q", "rationale": "R", "answer": "1"}, {"drop_last_step": True}, "needs steps, and 'rationale' is plain text"),
        ({"prompt": "Q", "answer": "1"}, {"drop_last_step": True}, "the record has no rationale"),
        ({"messages": [{"role": "user", "content": "Q"}]}, {"answer_prefix": "#"}, "does not apply to messages"),
        ({"question": "Q", "steps": ["a", 3], "answer": "1"}, {}, r"steps\[1\] must be a string, not int"),
        ({"instruction": "Q", "output": 3}, {}, "'output' must be a string, not int"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, {}, r"conversations\[0\].from is 'narrator'. Use one of human"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, r"messages\[0\].content must be a string, not int"),
        ({"messages": [{"role": "user"}]}, {}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, r"content\[0\] must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, {}, r"tool_calls\[0\] must have a function with a name"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, {}, r"messages\[0\]: a value is not JSON: half of a surrogate pair"),
        ({"messages": []}, {}, "the record is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_field(load: Load, row: Any, settings: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message) as error:
        load(row, **settings)
    assert "\n" not in str(error.value)


def test_messages_stay_as_they_are(load: Load) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "cafe\u0301?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "extra": 1},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "reasoning_content": "Four.", "content": ""},
        {"role": "assistant", "content": "<think>\nYes.\n</think>\n\nIt is 4."},
        {"role": "assistant", "content": [{"type": "text", "text": "Bye."}]},
    ]
    corpus = load({"messages": messages})
    (record,) = corpus.records
    composed = [{**m, "content": "café?"} if m["role"] == "user" else m for m in messages]
    assert record.messages == tuple(composed)
    assert corpus.num_chats == corpus.subset([0]).num_chats == 1
    assert _segments(record) == [
        (P, "café?"),
        (P, "\n4"),
        (R, "\nFour."),
        (R, "\n<think>\nYes.\n</think>"),
        (A, "\n\nIt is 4."),
        (A, "\nBye."),
    ]
    assert [(role, record.text[a:b]) for role, a, b in record.turns] == [
        ("user", "café?"),
        ("tool", "4"),
        ("assistant", "Four."),
        ("assistant", "<think>\nYes.\n</think>\n\nIt is 4."),
        ("assistant", "Bye."),
    ]
    assert corpus.notes[1:] == (
        "keys of messages whose text is not read: extra",
        "1 records have tool calls, which are read under a chat template alone",
    )
    other = [messages[0] | {"content": "Be brief."}, *messages[1:]]
    assert load({"messages": other}).digest != corpus.digest
    called = [m | {"tool_calls": []} if "tool_calls" in m else m for m in messages]
    called[2] |= {"content": ""}
    assert load({"messages": called}).digest != corpus.digest


def test_parquets_absent_keys_are_absent(load: Load) -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "C", "tool_calls": None, "name": None},
    ]
    plain = [{key: value for key, value in message.items() if value is not None} for message in chat]
    assert load({"messages": chat}).digest == load({"messages": plain}).digest


def test_an_empty_system_prompt_is_rendered_and_two_turns_stay_two(load: Load) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im|>system\nDefault.<|end|>\n{% endif %}"
        "{% for m in messages %}<|im|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    )
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    (record,) = load({"messages": messages}).records
    tokens = Encoder(tokenizer, chat_template=True).encode(record)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokens.input_ids) == rendered
    assert "Default" not in rendered
    assert rendered.count("<|im|>assistant") == 2
    raw = record.text.encode()
    assert b"".join(raw[a:b] for a, b in tokens.spans.tolist()) == b"Qonetwo"


def test_gsm8k_keeps_every_token(load: Load) -> None:
    """Segments cut the text and change none of it: tokens are those of question and answer, as in the file."""
    rows = [
        {"question": f"{n}. {question}", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}"}
        for n, question in enumerate(TEXTS)
    ]
    encoder = Encoder(byte_level_tokenizer())
    count = count_tokens(encoder, load(*rows))
    whole = [encoder.tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"] for row in rows]
    assert list(count.lengths) == [len(ids) for ids in whole]
    assert sum(count.segments.values()) == count.rows()
    assert all(count.segments.values())
